//! Threads for what may block: connecting, and reading from a donor.
//!
//! Postgres knows one thread, the worker's main one. The others obey three rules, kept here:
//!
//! * all signals are blocked in them from birth, so that SIGTERM is always handled on the main one;
//! * they never call Postgres: they speak through a bounded channel, and wake the main loop by a
//!   byte on a socket that it waits on beside its latch;
//! * a panic does not vanish with the thread: it is caught and becomes a message like any other,
//!   upon which the main thread ends the worker and the postmaster starts a new one.
//!
//! No thread is joined. Each ends by itself, at the latest when its socket times out after the
//! receiver of its channel is gone; and all of them end with the worker's process.

use std::any::Any;
use std::io::{self, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// The main loop's end: readable after a thread has called [`Waker::wake`].
pub struct WakeReceiver(UnixStream);

/// A thread's end.
#[derive(Clone)]
pub struct Waker(Arc<UnixStream>);

pub fn waker() -> io::Result<(Waker, WakeReceiver)> {
    let (sender, receiver) = UnixStream::pair()?;
    sender.set_nonblocking(true)?;
    receiver.set_nonblocking(true)?;
    Ok((Waker(Arc::new(sender)), WakeReceiver(receiver)))
}

impl Waker {
    /// After what the main loop shall see has been put where it looks.
    pub fn wake(&self) {
        // If the socket is full, the main loop has been woken already and has yet to look; if it
        // is closed, the worker is ending.
        let _ = (&*self.0).write(&[1]);
    }
}

impl WakeReceiver {
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Before looking at what the threads have said, so that nothing is missed.
    pub fn clear(&self) {
        let mut bytes = [0; 64];
        while matches!((&self.0).read(&mut bytes), Ok(n) if n == bytes.len()) {}
    }
}

/// Starts a thread named `name` (at most 15 bytes are shown by tools) that runs `body`, and hands
/// the text of a panic to `on_panic`, on the same thread.
pub fn spawn(
    name: String,
    body: impl FnOnce() + Send + 'static,
    on_panic: impl FnOnce(String) + Send + 'static,
) -> io::Result<()> {
    let guarded = move || {
        // What `body` had in hand is dropped with it; nothing of it is looked at again.
        if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
            on_panic(panic_text(&*panic));
        }
    };
    // A thread inherits its parent's mask, so the parent blocks everything while it gives birth.
    let old_mask = block_all_signals();
    let spawned = std::thread::Builder::new().name(name).spawn(guarded);
    restore_signals(&old_mask);
    spawned.map(drop)
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.unwrap_or_else(|| "panic without a text".to_owned())
}

fn block_all_signals() -> libc::sigset_t {
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut old = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are valid for writing; sigfillset fills the one, pthread_sigmask the
    // other. Neither can fail with these arguments.
    unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), old.as_mut_ptr());
        old.assume_init()
    }
}

fn restore_signals(old: &libc::sigset_t) {
    // SAFETY: a mask that pthread_sigmask gave us.
    unsafe {
        libc::pthread_sigmask(libc::SIG_SETMASK, old, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn blocked(signal: i32) -> bool {
        let mut mask = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: a null set changes nothing, and the current mask is written.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), mask.as_mut_ptr());
            libc::sigismember(mask.as_ptr(), signal) == 1
        }
    }

    #[test]
    fn a_thread_is_born_with_signals_blocked_and_its_parent_keeps_its_own() {
        let (send, receive) = mpsc::channel();
        spawn(
            "test".into(),
            move || send.send(blocked(libc::SIGTERM)).expect("heard"),
            |_| {},
        )
        .expect("a thread");
        assert_eq!(receive.recv(), Ok(true));
        assert!(!blocked(libc::SIGTERM));
    }

    #[test]
    fn a_panic_becomes_a_message() {
        let (send, receive) = mpsc::channel();
        spawn(
            "test".into(),
            || panic!("number {}", 7),
            move |text| send.send(text).expect("heard"),
        )
        .expect("a thread");
        assert_eq!(receive.recv().as_deref(), Ok("number 7"));
    }

    #[test]
    fn a_wake_is_seen_once_and_never_blocks() {
        let (waker, receiver) = waker().expect("a socket pair");
        for _ in 0..1_000_000 {
            waker.wake();
        }
        receiver.clear();
        let mut byte = [0];
        let error = (&receiver.0).read(&mut byte).expect_err("nothing left");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
