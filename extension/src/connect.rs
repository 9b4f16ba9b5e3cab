//! Opening a connection to a safekeeper: resolve, connect, encrypt, shake hands.
//!
//! All of it may block, a name server most of all, so it runs on a thread of its own (see
//! `threads.rs`); what comes back is a socket on which the next byte is a message of the codec.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded};
use safekeeper_protocol::PeerAddress;
use safekeeper_wire::channel::Channel;
use safekeeper_wire::credentials::Credentials;
use safekeeper_wire::tls::TlsError;
use socket2::{SockRef, TcpKeepalive};

use crate::pgwire::{WireError, start_wal_push};
use crate::threads::{self, Waker};

/// A dead host is noticed by heartbeats; keepalive is for connections that carry none.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// How to dial.
#[derive(Clone, Debug)]
pub struct Dial {
    pub address: PeerAddress,
    pub credentials: Credentials,
    /// For each address the host name resolves to, and for all that is said until WAL can be pushed.
    pub timeout: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("could not translate host name \"{host}\" to an address: {source}")]
    Resolve { host: String, source: io::Error },
    #[error("{0}")]
    Connect(io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Handshake(#[from] WireError),
}

impl ConnectError {
    /// The host answers, and nobody listens there.
    fn is_refused(&self) -> bool {
        matches!(self, ConnectError::Connect(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// A connection on which the next byte is a message of the codec.
pub struct Connected {
    pub stream: Channel,
    /// From a question to its answer.
    pub round_trip: Duration,
}

/// Outcome of dialling on a thread.
pub enum Dialled {
    Connected(Connected),
    Failed {
        reason: String,
        /// The host answers, and nobody listens there.
        refused: bool,
    },
    /// The thread panicked: a defect of ours, on which the worker ends.
    Panicked(String),
}

/// Connects on this thread. The stream blocks, with the time-out set for reading and writing.
pub fn connect(dial: &Dial) -> Result<Connected, ConnectError> {
    let PeerAddress { host, port } = &dial.address;
    let resolve_error = |source| ConnectError::Resolve {
        host: host.clone(),
        source,
    };
    let addresses = (host.as_str(), dial.address.port)
        .to_socket_addrs()
        .map_err(resolve_error)?;
    let mut last_error = None;
    for address in addresses {
        match TcpStream::connect_timeout(&address, dial.timeout) {
            Ok(socket) => {
                prepare(&socket, dial.timeout).map_err(ConnectError::Connect)?;
                let mut stream = Channel::from(socket);
                let credentials = &dial.credentials;
                let Credentials { user, tls, .. } = credentials;
                let deadline = Instant::now() + dial.timeout;
                stream.request_tls(tls, host, deadline)?;
                let login = credentials.login(host, *port, stream.peer_end_point());
                let round_trip = start_wal_push(&mut stream.until(deadline), user, login)?;
                prepare(stream.socket(), dial.timeout).map_err(ConnectError::Connect)?;
                return Ok(Connected { stream, round_trip });
            }
            Err(error) => last_error = Some(error),
        }
    }
    let none = || resolve_error(io::Error::other("it has none"));
    Err(last_error.map_or_else(none, ConnectError::Connect))
}

fn prepare(stream: &TcpStream, timeout: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(timeout))?;
    stream.set_write_timeout(Some(timeout))?;
    SockRef::from(stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE))
}

/// Connects on a thread; the outcome, with a stream that does not block, comes over the channel,
/// and then `waker` is called.
pub fn connect_in_background(dial: Dial, waker: Waker) -> io::Result<Receiver<Dialled>> {
    // One outcome, so a channel of one never blocks the thread.
    let (outcome, receiver) = bounded(1);
    let panicked = (outcome.clone(), waker.clone());
    let body = move || {
        let connected = connect(&dial).and_then(|mut connected| {
            let unblocked = connected.stream.set_nonblocking(true);
            unblocked.map(|()| connected).map_err(ConnectError::Connect)
        });
        let failed = |error: ConnectError| Dialled::Failed {
            reason: error.to_string(),
            refused: error.is_refused(),
        };
        // If the receiver is gone, nobody wants the connection any more.
        let _ = outcome.send(connected.map_or_else(failed, Dialled::Connected));
        waker.wake();
    };
    threads::spawn("connect".to_owned(), body, move |text| {
        let (outcome, waker) = panicked;
        let _ = outcome.try_send(Dialled::Panicked(text));
        waker.wake();
    })?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads::waker;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn dial(port: u16) -> Dial {
        Dial {
            address: PeerAddress {
                host: "127.0.0.1".into(),
                port,
            },
            credentials: Credentials::trusted("me"),
            timeout: Duration::from_millis(300),
        }
    }

    fn failure(dial: Dial) -> String {
        let (waker, _receiver) = waker().expect("a socket pair");
        let outcome = connect_in_background(dial, waker).expect("a thread");
        match outcome
            .recv_timeout(Duration::from_secs(60))
            .expect("an outcome")
        {
            Dialled::Connected(_) => panic!("connected"),
            Dialled::Failed { reason: text, .. } | Dialled::Panicked(text) => text,
        }
    }

    #[test]
    fn a_failure_says_what_failed() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        // It accepts (the kernel does), and never answers.
        assert_eq!(failure(dial(port)), "timed out");
        drop(listener);
        assert!(failure(dial(port)).starts_with("Connection refused"));
        let mut unresolvable = dial(port);
        unresolvable.address.host = "no such host.invalid".into();
        let text = failure(unresolvable);
        assert!(
            text.starts_with("could not translate host name \"no such host.invalid\""),
            "{text}"
        );
    }

    /// Notices give nobody more time, nor do a message's bytes one by one.
    #[test]
    fn a_server_that_goes_on_talking_keeps_no_dial() {
        let long = [&b"N\0\0\x10\0"[..], &[0; 4092]].concat();
        for (said, piece) in [(b"N\0\0\0\x05\0".repeat(1000), 6000), (long, 1)] {
            let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
            let port = listener.local_addr().expect("bound").port();
            let talker = std::thread::spawn(move || {
                let (mut client, _) = listener.accept().expect("a client");
                let mut pieces = said.chunks(piece).cycle();
                while client
                    .write_all(pieces.next().expect("without end"))
                    .is_ok()
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            assert_eq!(failure(dial(port)), "timed out");
            talker.join().expect("no panic");
        }
    }

    #[test]
    fn a_connection_is_handed_over_ready_and_not_blocking() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("bound").port();
        let (waker, _receiver) = waker().expect("a socket pair");
        let outcome = connect_in_background(dial(port), waker).expect("a thread");
        let (mut server, _) = listener.accept().expect("a client");
        server
            .write_all(b"R\0\0\0\x08\0\0\0\0Z\0\0\0\x05IW\0\0\0\x07\0\0\0")
            .expect("sent");
        let Ok(Dialled::Connected(Connected { mut stream, .. })) = outcome.recv() else {
            panic!("not connected");
        };
        let error = stream.read(&mut [0]).expect_err("nothing to read");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }
}
