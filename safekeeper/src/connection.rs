//! One connection: the handshake, then commands, one after another.
//!
//! ```text
//!   SSLRequest     ─► 'S' and the handshake of TLS, or 'N'             GSSENCRequest ─► 'N'
//!   startup packet ─► who are you? (authenticate.rs)                   within 10 s altogether
//!                     AuthenticationOk, parameters, ReadyForQuery
//!   'Q' command    ─► result or error, ReadyForQuery                   again and again
//!   'X', the end of the stream, or a fatal error
//! ```
//!
//! Between commands a peer may be silent for as long as it likes, as with a primary; TCP notices
//! when its host is gone. Before its first command it may not: it has shown nothing yet. Inside a message it may not: one that has begun must arrive within a
//! minute. So no peer holds a thread for nothing.
//!
//! Not here: what a proposer and a consumer say to each other
//! after their command (receive_wal.rs, send_wal.rs).

use std::io::{self, IoSlice};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use safekeeper_wire::channel::{Channel, TLS_HANDSHAKE};
use safekeeper_wire::pgwire::{
    ConnectionError, ErrorReport, Filled, Input, LEN_MAX_UNAUTHENTICATED, Output, Wait, closed,
};
use safekeeper_wire::startup::{Opening, Startup, next_opening};
use safekeeper_wire::tls::ServerTls;

use crate::access::AccessControl;
use crate::authenticate::authenticate;
use crate::replication_command::{ReplicationCommand, parse};
use crate::server::Shared;
use crate::users::Role;
use crate::{receive_wal, send_wal};

/// The handshake takes a round trip or two; who needs longer is not there.
const STARTUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest silence inside a message, and longest wait for a peer to take what we send.
pub const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest command text, in bytes.
const COMMAND_LEN_MAX: usize = LEN_MAX_UNAUTHENTICATED;

/// Milliseconds since the process started, of a clock that never goes back.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    pub fn start() -> Clock {
        Clock(Instant::now())
    }

    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[derive(Debug)]
pub struct Connection {
    pub channel: Channel,
    pub input: Input,
    pub output: Output,
    pub clock: Clock,
    pub startup: Startup,
    pub shared: Arc<Shared>,
    /// What the peer may do; nothing before it is known who it is.
    roles: Vec<Role>,
    /// It has given a command since the handshake.
    has_spoken: bool,
    id: u64,
    peer: SocketAddr,
}

impl Connection {
    /// `id` is never used again while the process runs.
    pub fn new(socket: TcpStream, peer: SocketAddr, id: u64, shared: Arc<Shared>) -> Connection {
        Connection {
            channel: socket.into(),
            input: Input::default(),
            output: Output::default(),
            clock: shared.clock,
            startup: Startup::default(),
            shared,
            roles: Vec::new(),
            has_spoken: false,
            id,
            peer,
        }
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn peer(&self) -> SocketAddr {
        self.peer
    }

    /// Serve the peer until it leaves or must.
    pub fn run(mut self) {
        let ended = self.serve();
        self.drop_temporary_slots();
        let report = match ended {
            Ok(()) => return,
            Err(_) if self.shared.is_stopping() => ErrorReport::new(
                "57P01",
                "terminating connection due to administrator command",
            ),
            Err(ConnectionError::Lost(error)) => {
                log::debug!("connection lost from={} ({error})", self.peer);
                return;
            }
            Err(ConnectionError::Command(report) | ConnectionError::Fatal(report)) => {
                let detail = report.detail.as_deref().unwrap_or("");
                log::warn!(
                    "connection ended: {} {detail} sqlstate={} from={} application_name={}",
                    report.message,
                    report.sqlstate,
                    self.peer,
                    self.startup.application_name
                );
                report
            }
        };
        self.output.error("FATAL", &report);
        // The peer may be gone already, and this was the last thing to say.
        let _ = self.output.send(&mut self.channel);
        self.discard_input();
    }

    /// To close a socket with unread input makes the kernel throw away what the peer has not yet
    /// read of our last words. So say that nothing more comes, and read for a moment.
    fn discard_input(&mut self) {
        self.channel.end_output();
        let deadline = Instant::now() + Duration::from_secs(1);
        while let Some(left) = deadline.checked_duration_since(Instant::now())
            && !left.is_zero()
            && self.channel.socket().set_read_timeout(Some(left)).is_ok()
        {
            self.input.discard();
            match self.input.fill(&mut self.channel, Wait::Yes) {
                Ok(Filled::Some) => {}
                _ => return,
            }
        }
    }

    fn serve(&mut self) -> Result<(), ConnectionError> {
        self.channel.socket().set_nodelay(true)?;
        let deadline = Instant::now() + STARTUP_TIMEOUT;
        // One for all of it: what is reloaded meanwhile is for the next.
        let access = self.shared.access();
        let Some(startup) = self.handshake(&access, deadline)? else {
            return Ok(());
        };
        self.startup = startup;
        self.roles = authenticate(self, &access, deadline)?;
        self.shared.let_in(self.id, &access, &self.roles)?;
        let (socket, patience) = (
            self.channel.socket(),
            self.shared.config.first_command_timeout,
        );
        socket.set_write_timeout(Some(STALL_TIMEOUT))?;
        socket.set_read_timeout(Some(patience))?;
        self.greet()?;
        self.wait_for_frame(COMMAND_LEN_MAX)?;
        self.has_spoken = true;
        self.channel
            .socket()
            .set_read_timeout(Some(STALL_TIMEOUT))?;
        self.run_commands()
    }

    /// None: the peer only wanted something cancelled.
    fn handshake(
        &mut self,
        access: &AccessControl,
        deadline: Instant,
    ) -> Result<Option<Startup>, ConnectionError> {
        let tls = access.tls.as_ref();
        let (mut has_asked_tls, mut has_asked_gssapi) = (false, false);
        loop {
            self.wait_until(deadline)?;
            let tls = tls.filter(|_| !self.channel.is_encrypted());
            if let Some(tls) = tls
                && self.input.arrived().first() == Some(&TLS_HANDSHAKE)
            {
                self.encrypt(tls, deadline)?;
                if !self.channel.has_named_protocol() {
                    return Err(ConnectionError::Fatal(ErrorReport::protocol(
                        "received direct SSL connection request without ALPN protocol negotiation extension",
                    )));
                }
                continue;
            }
            let opening = next_opening(&mut self.input).map_err(ConnectionError::Fatal)?;
            match opening {
                Some(Opening::Startup(startup)) => return Ok(Some(startup)),
                Some(Opening::Cancel) => return Ok(None),
                Some(Opening::Tls | Opening::Gssapi) if self.channel.is_encrypted() => {
                    return Err(ConnectionError::Fatal(ErrorReport::protocol(
                        "encryption asked for inside an encrypted connection",
                    )));
                }
                Some(Opening::Tls) if std::mem::replace(&mut has_asked_tls, true) => {
                    return Err(asked_twice());
                }
                Some(Opening::Gssapi) if std::mem::replace(&mut has_asked_gssapi, true) => {
                    return Err(asked_twice());
                }
                Some(Opening::Tls) if let Some(tls) = tls => {
                    // What came along unencrypted may be of somebody in between.
                    if self.input.is_inside_frame() {
                        return Err(ConnectionError::Fatal(
                            ErrorReport::protocol("received unencrypted data after SSL request")
                                .detail(
                                    "This could be either a client-software bug or evidence of an attempted \
                                     man-in-the-middle attack.",
                                ),
                        ));
                    }
                    self.channel.send_all(&mut [IoSlice::new(b"S")])?;
                    self.encrypt(tls, deadline)?;
                }
                // The peer decides whether to go on without.
                Some(Opening::Tls | Opening::Gssapi) => {
                    self.channel.send_all(&mut [IoSlice::new(b"N")])?;
                }
                None => {
                    if self.input.fill(&mut self.channel, Wait::Yes)? == Filled::Closed {
                        return Err(closed().into());
                    }
                }
            }
        }
    }

    /// Until it is known who the peer is, nothing waits longer than that, neither reading nor writing.
    pub fn wait_until(&self, deadline: Instant) -> Result<(), ConnectionError> {
        self.channel
            .wait_until(deadline)
            .map_err(|error| match error.kind() {
                io::ErrorKind::TimedOut => ConnectionError::Fatal(ErrorReport::new(
                    "08006",
                    "canceling authentication due to timeout",
                )),
                _ => error.into(),
            })
    }

    /// The handshake of TLS, of which the beginning may have arrived.
    fn encrypt(&mut self, tls: &ServerTls, deadline: Instant) -> Result<(), ConnectionError> {
        let arrived = self.input.arrived().to_vec();
        self.input.discard();
        let accepted = self
            .channel
            .accept_tls(tls.config.clone(), &arrived, deadline);
        accepted.map_err(|error| {
            // The peer has been told by TLS's own alert, if at all.
            log::warn!(
                "could not accept an encrypted connection: {error} from={}",
                self.peer
            );
            ConnectionError::Lost(io::Error::other(error))
        })
    }

    /// What a server says when a session begins. Clients look for these settings; the version is
    /// that of the cluster they are going to stream from.
    fn greet(&mut self) -> Result<(), ConnectionError> {
        let choice = self.shared.clusters.choose(self.startup.cluster.as_deref());
        let pg_major = match (&choice, &self.startup.cluster) {
            (Ok(keeper), _) => keeper.cluster().pg_major,
            (Err(report), Some(_)) => return Err(ConnectionError::Fatal(report.clone())),
            // Several or none: a proposer does not mind, and a consumer is told at its command.
            (Err(_), None) => safekeeper_wal::PgVersion::ALL[0].major(),
        };
        let output = &mut self.output;
        if self.startup.negotiate {
            output.negotiate_protocol_version(&self.startup.unrecognized);
        }
        output.authentication_ok();
        for (name, value) in [
            ("server_version", format!("{pg_major}.0").as_str()),
            ("server_encoding", "UTF8"),
            ("client_encoding", "UTF8"),
            ("application_name", &self.startup.application_name),
            ("is_superuser", "off"),
            ("session_authorization", &self.startup.user),
            ("DateStyle", "ISO, MDY"),
            ("IntervalStyle", "postgres"),
            ("TimeZone", "UTC"),
            ("integer_datetimes", "on"),
            ("standard_conforming_strings", "on"),
            ("default_transaction_read_only", "off"),
            ("in_hot_standby", "off"),
        ] {
            output.parameter_status(name, value);
        }
        if pg_major >= 16 {
            output.parameter_status("scram_iterations", "4096");
        }
        if pg_major >= 18 {
            output.parameter_status("search_path", "\"$user\", public");
        }
        // Nothing here can be cancelled, so the key opens nothing.
        output.backend_key_data(std::process::id(), self.id as u32);
        output.ready_for_query();
        self.send()
    }

    fn run_commands(&mut self) -> Result<(), ConnectionError> {
        // After an error in the extended protocol everything is skipped up to a Sync.
        let mut skipping = false;
        loop {
            self.wait_for_frame(COMMAND_LEN_MAX)?;
            let next = self.input.next_frame(COMMAND_LEN_MAX);
            let Some(frame) = next.map_err(ConnectionError::Fatal)? else {
                continue;
            };
            match frame.tag {
                b'X' => return Ok(()),
                b'S' => {
                    skipping = false;
                    self.output.ready_for_query();
                }
                _ if skipping => {}
                b'Q' => {
                    let command = command_of(frame.body);
                    match command.and_then(|command| self.run_command(command)) {
                        Ok(After::Ready) => {}
                        Ok(After::End) => return Ok(()),
                        Err(ConnectionError::Command(report)) => {
                            log::debug!("command failed: {} from={}", report.message, self.peer);
                            self.output.error("ERROR", &report);
                            self.drop_temporary_slots();
                        }
                        Err(error) => return Err(error),
                    }
                    self.output.ready_for_query();
                }
                b'P' | b'B' | b'D' | b'E' | b'C' | b'F' | b'H' => {
                    let function_call = frame.tag == b'F';
                    let what = if function_call {
                        "fastpath function calls"
                    } else {
                        "extended query protocol"
                    };
                    let text = format!("{what} not supported in a replication connection");
                    self.output.error("ERROR", &ErrorReport::protocol(text));
                    // A function call has no Sync after it.
                    skipping = !function_call;
                    if function_call {
                        self.output.ready_for_query();
                    }
                }
                // Left over from a copy that ended with an error.
                b'd' | b'c' | b'f' => {}
                tag => {
                    return Err(ConnectionError::Fatal(ErrorReport::protocol(format!(
                        "invalid frontend message type {tag}"
                    ))));
                }
            }
            self.send()?;
        }
    }

    fn check_role(&self, command: &ReplicationCommand) -> Result<(), ConnectionError> {
        let (needed, what) = match command {
            ReplicationCommand::StartWalPush => (&[Role::Proposer][..], "push WAL"),
            ReplicationCommand::IdentifySystem
            | ReplicationCommand::Show(_)
            | ReplicationCommand::ReadReplicationSlot(_) => (&Role::ALL[..], "look"),
            // A proposer reads, too: from a donor.
            _ => (
                &[Role::Replication, Role::Proposer, Role::Admin][..],
                "read WAL",
            ),
        };
        if needed.iter().any(|role| self.roles.contains(role)) {
            return Ok(());
        }
        let report = ErrorReport::new("42501", format!("permission denied to {what}"));
        Err(ConnectionError::Command(report.detail(format!(
            "The user \"{}\" has not the role {}.",
            self.startup.user, needed[0]
        ))))
    }

    fn run_command(&mut self, command: ReplicationCommand) -> Result<After, ConnectionError> {
        self.check_role(&command)?;
        let shared = self.shared.clone();
        match command {
            ReplicationCommand::StartWalPush => {
                receive_wal::receive(self, &shared.clusters)?;
                return Ok(After::End);
            }
            command => {
                let keeper = shared
                    .clusters
                    .choose(self.startup.cluster.as_deref())
                    .map_err(ConnectionError::Command)?;
                send_wal::run_command(self, &keeper, command)?;
            }
        }
        Ok(After::Ready)
    }

    /// Temporary replication slots end with the session, and with its first error, as a primary's.
    fn drop_temporary_slots(&self) {
        for keeper in self.shared.clusters.keepers() {
            if keeper.slots.drop_temporary(self.id) {
                keeper.consumers.gather_feedback();
            }
        }
    }

    /// The peer has not closed its side. For whoever waits for something else.
    pub fn is_peer_there(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(
            self.channel.as_fd(),
            PollFlags::RDHUP,
        )];
        match poll(&mut fds, Some(&Timespec::default())) {
            Ok(_) => fds[0].revents().is_empty(),
            Err(errno) => errno == Errno::INTR,
        }
    }

    pub fn send(&mut self) -> Result<(), ConnectionError> {
        if self.output.is_empty() {
            return Ok(());
        }
        Ok(self.output.send(&mut self.channel)?)
    }

    /// The same, and then `rest`, to which the last message was begun.
    pub fn send_with(&mut self, rest: &[u8]) -> Result<(), ConnectionError> {
        Ok(self.output.send_with(&mut self.channel, rest)?)
    }

    /// Sleep until something new has arrived, unless there is something already. A message that
    /// stays incomplete for [`STALL_TIMEOUT`] ends the connection.
    pub fn wait_for_frame(&mut self, len_max: usize) -> Result<(), ConnectionError> {
        while !self
            .input
            .has_frame(len_max)
            .map_err(ConnectionError::Fatal)?
        {
            match self.input.fill(&mut self.channel, Wait::Yes)? {
                Filled::Some => {}
                Filled::Closed => return Err(closed().into()),
                Filled::Nothing if self.input.is_inside_frame() => {
                    return Err(ConnectionError::Fatal(ErrorReport::new(
                        "08006",
                        "the rest of a message did not arrive in time",
                    )));
                }
                Filled::Nothing if !self.has_spoken => {
                    return Err(ConnectionError::Fatal(ErrorReport::new(
                        "57P05",
                        "terminating connection due to idle-session timeout",
                    )));
                }
                Filled::Nothing => {}
            }
        }
        Ok(())
    }
}

fn asked_twice() -> ConnectionError {
    ConnectionError::Fatal(ErrorReport::protocol("encryption asked for twice"))
}

/// What follows a command.
enum After {
    Ready,
    /// The connection is used up.
    End,
}

/// The command of a Query message: text and a zero byte.
pub fn command_of(body: &[u8]) -> Result<ReplicationCommand, ConnectionError> {
    let text = body.strip_suffix(&[0]).ok_or_else(|| {
        ConnectionError::Fatal(ErrorReport::protocol("query text is not terminated"))
    })?;
    let text = std::str::from_utf8(text).map_err(|_| {
        ConnectionError::Command(ErrorReport::new("22021", "query text is not valid UTF-8"))
    })?;
    parse(text).map_err(ConnectionError::Command)
}
