//! A connection's bytes, in the clear or encrypted: what stands between a socket and the buffers of
//! pgwire.rs.
//!
//! ```text
//!   client                                  server
//!     SSLRequest                   ──►
//!                                  ◄──      'S', or 'N': not here
//!     TLS handshake                ◄─►
//!     startup packet, encrypted    ──►
//! ```
//!
//! A client of PostgreSQL 17 may leave out the question (`sslnegotiation=direct`) and begin with the
//! handshake, in which both then name the protocol, "postgresql".
//!
//! TLS itself is rustls; here it is made to look like a socket. One that does not block stays so: what the
//! kernel does not take is kept, encrypted, and [`Channel::has_output`] says so. What has been decrypted is
//! handed out before the socket is asked for more, and [`Channel::receive`] gives less than there is room
//! for only if nothing decrypted is left: so whoever sleeps in poll(2) then misses nothing. Others ask
//! [`Channel::has_input`].
//!
//! The end of the stream is believed without TLS's own sign of it: messages have lengths, so nothing can be
//! cut off unnoticed.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::RecvFlags;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConfig, ServerConnection};

use crate::pgwire::Wait;
use crate::startup::ssl_request;
use crate::tls::{ALPN, ClientTls, EndPoint, TlsError, common_name, end_point};

/// First byte of a TLS handshake; no startup packet begins with it, for it would be too long.
pub const TLS_HANDSHAKE: u8 = 0x16;

/// The pieces of a record come faster than that, one after another.
const TRICKLE: Duration = Duration::from_millis(20);

/// Longest record as it travels, in bytes: head, contents, what encryption adds. (RFC 8446, section 5.2)
const RECORD_LEN_MAX: usize = 5 + (1 << 14) + 256;

/// One connection.
#[derive(Debug)]
pub struct Channel {
    socket: TcpStream,
    session: Option<Box<rustls::Connection>>,
    blocks: bool,
}

impl From<TcpStream> for Channel {
    /// In the clear; the socket blocks.
    fn from(socket: TcpStream) -> Channel {
        Channel {
            socket,
            session: None,
            blocks: true,
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Channel {
    /// For what concerns the connection and not its bytes: time-outs, addresses, poll(2).
    pub fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Whether reading and writing wait for the peer; they do at first.
    pub fn set_nonblocking(&mut self, nonblocking: bool) -> io::Result<()> {
        self.blocks = !nonblocking;
        self.socket.set_nonblocking(nonblocking)
    }

    pub fn is_encrypted(&self) -> bool {
        self.session.is_some()
    }

    /// The server's side of the handshake, over by `deadline`. `arrived` is what has been read of it
    /// already. Leaves other time-outs on the socket.
    pub fn accept_tls(
        &mut self,
        config: Arc<ServerConfig>,
        arrived: &[u8],
        deadline: Instant,
    ) -> Result<(), TlsError> {
        let session = ServerConnection::new(config)?;
        self.shake_hands(session.into(), arrived, deadline)
    }

    /// As a client of `host`: asks for encryption, as far as `tls` says so. Leaves other time-outs on
    /// the socket.
    pub fn request_tls(
        &mut self,
        tls: &ClientTls,
        host: &str,
        deadline: Instant,
    ) -> Result<(), TlsError> {
        let Some(config) = tls.load()? else {
            return Ok(());
        };
        self.wait_until(deadline)?;
        self.socket.write_all(&ssl_request()).map_err(timed_out)?;
        let mut answer = [0];
        self.socket.read_exact(&mut answer).map_err(timed_out)?;
        match answer {
            [b'S'] => {}
            [b'N'] if tls.is_needed() => return Err(TlsError::NotOffered),
            [b'N'] => return Ok(()),
            [b'E'] => return Err(TlsError::Refused),
            [byte] => return Err(TlsError::Answer(byte)),
        }
        let name = match ServerName::try_from(host.to_owned()) {
            Ok(name) => name,
            Err(_) if tls.verifies_name() => return Err(TlsError::HostName(host.to_owned())),
            Err(_) => self.socket.peer_addr()?.ip().into(),
        };
        let session = ClientConnection::new(config, name)?;
        self.shake_hands(session.into(), &[], deadline)
    }

    fn shake_hands(
        &mut self,
        mut session: rustls::Connection,
        mut arrived: &[u8],
        deadline: Instant,
    ) -> Result<(), TlsError> {
        while session.is_handshaking() {
            self.wait_until(deadline)?;
            flush(&mut session, &self.socket).map_err(timed_out)?;
            // A peer that has said that nothing more comes.
            if !session.wants_read() {
                return Err(TlsError::Io(ErrorKind::UnexpectedEof.into()));
            }
            let read = if arrived.is_empty() {
                session.read_tls(&mut &self.socket).map_err(timed_out)?
            } else {
                session.read_tls(&mut arrived)?
            };
            if read == 0 {
                return Err(TlsError::Io(ErrorKind::UnexpectedEof.into()));
            }
            if let Err(error) = session.process_new_packets() {
                // An alert: the peer may be gone already.
                let _ = flush(&mut session, &self.socket);
                return Err(error.into());
            }
        }
        while !arrived.is_empty() {
            session.read_tls(&mut arrived)?;
            session.process_new_packets()?;
        }
        flush(&mut session, &self.socket).map_err(timed_out)?;
        self.session = Some(Box::new(session));
        Ok(())
    }

    /// From now on the socket waits no longer than that, for reading or for writing; `TimedOut` if it is over.
    pub fn wait_until(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.socket.set_read_timeout(Some(left))?;
        self.socket.set_write_timeout(Some(left))
    }

    /// For a conversation that must be over by then, however often the peer says something.
    pub fn until(&mut self, deadline: Instant) -> Until<'_> {
        Until {
            channel: self,
            deadline,
        }
    }

    /// Both have named the protocol in the handshake.
    pub fn has_named_protocol(&self) -> bool {
        let session = self.session.as_ref();
        session.and_then(|session| session.alpn_protocol()) == Some(ALPN)
    }

    /// Common name of the certificate that the peer has shown, and that an authority of ours has signed.
    pub fn peer_name(&self) -> Option<String> {
        let certificate = self.session.as_ref()?.peer_certificates()?.first()?;
        common_name(certificate)
    }

    /// What a client can bind its proof to, by the certificate that the peer has shown.
    pub fn peer_end_point(&self) -> EndPoint {
        let Some(session) = &self.session else {
            return EndPoint::Clear;
        };
        let certificate = session.peer_certificates().and_then(<[_]>::first);
        let hash = certificate.and_then(end_point);
        hash.map_or(EndPoint::NoHash, EndPoint::Hash)
    }

    /// Encrypted bytes wait for the socket to take them: [`Write::flush`] when it can.
    pub fn has_output(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.wants_write())
    }

    /// Something has been decrypted, and poll(2) does not know of it.
    pub fn has_input(&mut self) -> bool {
        self.session.as_mut().is_some_and(|session| {
            let state = session.process_new_packets();
            state.is_ok_and(|state| state.plaintext_bytes_to_read() > 0)
        })
    }

    /// Reads once; 0 is the end of the stream. Waits up to the socket's read timeout, if at all, also for a peer
    /// that says a byte now and then. Who does not wait is not kept by records that hold nothing, however many
    /// there are, nor by a peer that takes nothing.
    pub fn receive(&mut self, room: &mut [u8], wait: Wait) -> io::Result<usize> {
        let mut received = Received {
            socket: &self.socket,
            flags: match wait {
                Wait::Yes => RecvFlags::empty(),
                Wait::No => RecvFlags::DONTWAIT,
            },
        };
        let Some(session) = &mut self.session else {
            return received.read(room);
        };
        let waits = self.blocks && wait == Wait::Yes;
        let may_flush = waits || !self.blocks;
        let began = Instant::now();
        let mut n_read = 0;
        loop {
            if let Some(taken) = take_decrypted(session, room)? {
                return Ok(taken);
            }
            // Records come in pieces: the kernel is not asked for the time-out at each of them.
            if waits && began.elapsed() >= TRICKLE {
                received.wait_until(began, self.socket.read_timeout()?)?;
            } else if !waits && n_read > RECORD_LEN_MAX {
                return Err(ErrorKind::WouldBlock.into());
            }
            n_read += session.read_tls(&mut received)?;
            let processed = session.process_new_packets();
            // New keys were asked for, or it ends by an alert. If not now, it goes with what is sent next.
            if session.wants_write() && may_flush {
                match flush(session, &self.socket) {
                    // The peer may be gone already.
                    Err(_) if processed.is_err() => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    flushed => flushed?,
                }
            }
            processed.map_err(|error| io::Error::new(ErrorKind::InvalidData, error))?;
        }
    }

    /// Sends all of it, waiting for the peer up to the socket's write timeout.
    pub fn send_all(&mut self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        while slices.iter().any(|slice| !slice.is_empty()) {
            let taken = match &mut self.session {
                None => not_interrupted(|| (&self.socket).write_vectored(slices))?,
                Some(session) => {
                    let taken = session.writer().write_vectored(slices)?;
                    flush(session, &self.socket)?;
                    taken
                }
            };
            if taken == 0 {
                return Err(ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut slices, taken);
        }
        Ok(())
    }

    /// Nothing more will be sent. The peer may be gone already.
    pub fn end_output(&mut self) {
        if let Some(session) = &mut self.session {
            session.send_close_notify();
            let _ = flush(session, &self.socket);
        }
        let _ = self.socket.shutdown(Shutdown::Write);
    }
}

impl Read for Channel {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.receive(room, Wait::Yes)
    }
}

impl Write for Channel {
    /// `WouldBlock` if nothing was taken.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.write_vectored(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(session) = &mut self.session else {
            return (&self.socket).write_vectored(slices);
        };
        flush(session, &self.socket)?;
        let taken = session.writer().write_vectored(slices)?;
        match flush(session, &self.socket) {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    /// `WouldBlock` if something is left.
    fn flush(&mut self) -> io::Result<()> {
        match &mut self.session {
            Some(session) => flush(session, &self.socket),
            None => Ok(()),
        }
    }
}

/// A [`Channel`] for as long as there is time; then `TimedOut`.
pub struct Until<'a> {
    channel: &'a mut Channel,
    deadline: Instant,
}

impl Read for Until<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.channel.wait_until(self.deadline)?;
        self.channel.read(room)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.channel.wait_until(self.deadline)?;
        self.channel.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.channel.wait_until(self.deadline)?;
        self.channel.flush()
    }
}

/// recv(2), not interrupted.
struct Received<'a> {
    socket: &'a TcpStream,
    flags: RecvFlags,
}

impl Received<'_> {
    /// Something has come, or `WouldBlock` when `patience` since `began` is over.
    fn wait_until(&self, began: Instant, patience: Option<Duration>) -> io::Result<()> {
        let left = patience.map(|patience| patience.saturating_sub(began.elapsed()));
        if left.is_some_and(|left| left.is_zero()) {
            return Err(ErrorKind::WouldBlock.into());
        }
        let left = left.map(Timespec::try_from).transpose();
        let left = left.map_err(|_| io::Error::from(ErrorKind::InvalidInput))?;
        let mut fds = [PollFd::new(self.socket, PollFlags::IN)];
        match not_interrupted(|| Ok(poll(&mut fds, left.as_ref())?))? {
            0 => Err(ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }
}

impl Read for Received<'_> {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        not_interrupted(|| {
            let received = rustix::net::recv(self.socket, &mut *room, self.flags);
            Ok(received.map(|(n, _)| n)?)
        })
    }
}

/// As much as there is, or as there is room for; `None`: nothing yet.
fn take_decrypted(session: &mut rustls::Connection, room: &mut [u8]) -> io::Result<Option<usize>> {
    let mut taken = 0;
    while taken < room.len() {
        match session.reader().read(&mut room[taken..]) {
            Ok(0) => return Ok(Some(taken)),
            Ok(n) => taken += n,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Some(taken)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok((taken > 0).then_some(taken))
}

fn flush(session: &mut rustls::Connection, mut socket: &TcpStream) -> io::Result<()> {
    while session.wants_write() {
        if not_interrupted(|| session.write_tls(&mut socket))? == 0 {
            return Err(ErrorKind::WriteZero.into());
        }
    }
    Ok(())
}

fn not_interrupted(mut call: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match call() {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// What a time-out of a socket is called elsewhere.
fn timed_out(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

#[cfg(test)]
mod tests;
