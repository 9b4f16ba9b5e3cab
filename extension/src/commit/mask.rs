//! The signals that this process does not take now: they stay pending, or are kept where another thread
//! has taken them.

use std::ffi::c_int;
use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicBool, Ordering};

pub const DEFERRED: [c_int; 2] = [libc::SIGINT, libc::SIGTERM];

/// Signals that another thread has taken meanwhile.
static KEPT: [AtomicBool; DEFERRED.len()] = [const { AtomicBool::new(false) }; DEFERRED.len()];

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

pub fn action(handler: extern "C" fn(c_int)) -> libc::sigaction {
    // SAFETY: all zeroes are a valid value: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_RESTART;
    action
}

/// Returns the action that there was.
pub fn set_action(signal: c_int, action: &libc::sigaction) -> libc::sigaction {
    let mut before = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: both are valid for as long as the call lasts; it can't fail for these signals.
    unsafe {
        libc::sigaction(signal, action, before.as_mut_ptr());
        before.assume_init()
    }
}

/// On a thread that does not block it, or after Postgres has unblocked it. Not lost.
pub extern "C" fn keep(signal: c_int) {
    for (deferred, kept) in DEFERRED.iter().zip(&KEPT) {
        if *deferred == signal {
            kept.store(true, Ordering::Relaxed);
        }
    }
}

/// What was kept takes effect on this thread, by whatever handles it now.
pub fn raise_kept() {
    for (signal, kept) in DEFERRED.into_iter().zip(&KEPT) {
        if kept.swap(false, Ordering::Relaxed) {
            // SAFETY: a signal for this thread.
            unsafe { libc::raise(signal) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, PoisonError};

    /// Handlers belong to the process, and so to one test at a time.
    static HANDLERS: Mutex<()> = Mutex::new(());

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
        let _ours = HANDLERS.lock().unwrap_or_else(PoisonError::into_inner);
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

    /// The kernel gives it to any thread that does not block it.
    #[test]
    fn a_signal_on_another_thread_is_kept_and_raised_again() {
        let _ours = HANDLERS.lock().unwrap_or_else(PoisonError::into_inner);
        use std::sync::atomic::AtomicUsize;
        static CAME: AtomicUsize = AtomicUsize::new(0);
        extern "C" fn count(_signal: c_int) {
            CAME.fetch_add(1, Ordering::Relaxed);
        }
        let terminate = DEFERRED[1];
        set_action(terminate, &action(keep));
        // SAFETY: a signal for the thread that raises it.
        let other = std::thread::spawn(move || unsafe { libc::raise(terminate) });
        other.join().expect("it ends");
        set_action(terminate, &action(count));
        assert_eq!(CAME.load(Ordering::Relaxed), 0);
        raise_kept();
        assert_eq!(CAME.load(Ordering::Relaxed), 1);
        raise_kept();
        assert_eq!(CAME.load(Ordering::Relaxed), 1);
    }
}
