//! The signals that this process does not take now: they stay pending.

use std::ffi::c_int;
use std::mem::MaybeUninit;

/// Blocks or unblocks signals, by `libc::SIG_BLOCK` or `libc::SIG_UNBLOCK`. Returns the mask that there
/// was.
pub fn change(how: c_int, signals: impl IntoIterator<Item = c_int>) -> libc::sigset_t {
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset fills the one set, sigprocmask the other; the numbers are signals'. None
    // of the calls can fail with these arguments.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::sigprocmask(how, set.as_ptr(), before.as_mut_ptr());
        before.assume_init()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(signal: c_int) -> bool {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigpending fills the set.
        unsafe {
            libc::sigpending(set.as_mut_ptr());
            libc::sigismember(&set.assume_init(), signal) == 1
        }
    }

    #[test]
    fn a_blocked_signal_is_pending_until_it_is_unblocked() {
        extern "C" fn nothing(_signal: c_int) {}
        // SAFETY: a handler that does nothing; the signal is for this thread alone.
        let raise = |signal: c_int| unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
        let signals = [libc::SIGINT, libc::SIGTERM];
        for signal in signals {
            // SAFETY: likewise.
            unsafe { libc::signal(signal, nothing as *const () as usize) };
        }
        let before = change(libc::SIG_BLOCK, signals);
        let within = change(libc::SIG_BLOCK, signals);
        for signal in signals {
            // SAFETY: sets that sigprocmask filled.
            let was = [&before, &within].map(|set| unsafe { libc::sigismember(set, signal) });
            assert_eq!(was, [0, 1], "{signal}");
            raise(signal);
            assert!(pending(signal), "{signal}");
        }
        change(libc::SIG_UNBLOCK, signals);
        for signal in signals {
            assert!(!pending(signal), "{signal}");
            raise(signal);
            assert!(!pending(signal), "{signal}");
        }
    }
}
