//! Who the peer is: between the startup packet and the session. (`libpq/auth.c`, `libpq/auth-sasl.c`)
//!
//! ```text
//!   peer                                    here
//!     startup packet               ──►
//!                                           the rule for its address and name (access.rs);
//!                                           its certificate                    cert only
//!                                  ◄──      AuthenticationSASL                 scram only
//!     mechanism, first message     ──►
//!                                  ◄──      salt, iterations, nonce
//!     proof                        ──►
//!                                  ◄──      signature; AuthenticationOk follows
//! ```
//!
//! A user that there is not is asked as any other, and told the same. The handshake of TLS has checked who
//! signed a certificate and when it expires; here it is only the name.

use std::time::Instant;

use safekeeper_wire::pgwire::{
    ConnectionError, ErrorReport, Filled, LEN_MAX_UNAUTHENTICATED, Wait, closed,
};
use safekeeper_wire::scram::{MECHANISM, MECHANISM_PLUS, ServerExchange, Verifier};

use crate::access::{AccessControl, Method, method_for};
use crate::connection::Connection;
use crate::users::Role;

/// What the peer may do, once it has shown who it is.
pub fn authenticate(
    connection: &mut Connection,
    access: &AccessControl,
    deadline: Instant,
) -> Result<Vec<Role>, ConnectionError> {
    let user = connection.startup.user.clone();
    let address = connection.peer().ip();
    let known = access.users.find(&user).cloned();
    let is_encrypted = connection.channel.is_encrypted();
    let refused = |what: &str| {
        ConnectionError::Fatal(ErrorReport::new(
            "28000",
            format!(
                "{what} for host \"{address}\", user \"{user}\", {} encryption",
                if is_encrypted { "SSL" } else { "no" }
            ),
        ))
    };
    match method_for(&access.rules, address, is_encrypted, &user) {
        // Whoever is trusted without being known may do everything.
        Some(Method::Trust) => Ok(known.map_or(Role::ALL.to_vec(), |user| user.roles)),
        Some(Method::Reject) => Err(refused("access is rejected")),
        None => Err(refused("no access rule")),
        Some(Method::Cert) => {
            let name = connection.channel.peer_name().ok_or_else(|| {
                let text = "connection requires a valid client certificate";
                ConnectionError::Fatal(ErrorReport::new("28000", text))
            })?;
            let known = known.filter(|user| user.name == name);
            known.map(|user| user.roles).ok_or_else(|| {
                let text = format!("certificate authentication failed for user \"{user}\"");
                ConnectionError::Fatal(ErrorReport::new("28000", text))
            })
        }
        Some(Method::Scram) => {
            let question = Question {
                verifier: known.as_ref().and_then(|user| user.verifier.clone()),
                nobody: Verifier::of_nobody(&user, &access.salt_key),
                end_point: access.tls.as_ref().and_then(|tls| tls.end_point.as_deref()),
            };
            match question.ask(connection, deadline)? {
                true => Ok(known.map_or(Vec::new(), |user| user.roles)),
                false => Err(ConnectionError::Fatal(ErrorReport::new(
                    "28P01",
                    format!("password authentication failed for user \"{user}\""),
                ))),
            }
        }
    }
}

/// What a password is asked with.
struct Question<'a> {
    /// `None`: there is no such user, or none with a password.
    verifier: Option<Verifier>,
    /// In its place.
    nobody: Verifier,
    /// Of our certificate.
    end_point: Option<&'a [u8]>,
}

impl Question<'_> {
    /// Whether the peer has proved the password.
    fn ask(self, connection: &mut Connection, deadline: Instant) -> Result<bool, ConnectionError> {
        let is_encrypted = connection.channel.is_encrypted();
        let end_point = self.end_point.filter(|_| is_encrypted);
        connection.output.authentication_sasl(match end_point {
            Some(_) => &[MECHANISM_PLUS, MECHANISM],
            None => &[MECHANISM],
        });
        connection.send()?;
        let first = next_answer(connection, deadline)?;
        let (mechanism, first) = initial_response(&first).map_err(ConnectionError::Fatal)?;
        let is_known = self.verifier.is_some();
        let verifier = self.verifier.unwrap_or(self.nobody);
        let exchange = ServerExchange::begin(verifier, is_known, mechanism, end_point, first)
            .map_err(ConnectionError::Fatal)?;
        let server_first = exchange.server_first();
        connection
            .output
            .authentication_sasl_data(false, server_first);
        connection.send()?;
        let proof = next_answer(connection, deadline)?;
        match exchange.finish(&proof).map_err(ConnectionError::Fatal)? {
            Some(signature) => {
                connection.output.authentication_sasl_data(true, &signature);
                Ok(true)
            }
            None => Ok(false),
        }
    }
}

/// The mechanism's name, and behind a length its first message.
fn initial_response(body: &[u8]) -> Result<(&[u8], &[u8]), ErrorReport> {
    let malformed = || ErrorReport::protocol("malformed SASLInitialResponse message");
    let end = body
        .iter()
        .position(|byte| *byte == 0)
        .ok_or_else(malformed)?;
    let (mechanism, rest) = (&body[..end], &body[end + 1..]);
    let (len, data) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
    let is_whole = usize::try_from(u32::from_be_bytes(*len)) == Ok(data.len());
    is_whole.then_some((mechanism, data)).ok_or_else(malformed)
}

/// The body of the peer's next message, which must be an answer.
fn next_answer(connection: &mut Connection, deadline: Instant) -> Result<Vec<u8>, ConnectionError> {
    loop {
        let next = connection.input.next_frame(LEN_MAX_UNAUTHENTICATED);
        if let Some(frame) = next.map_err(ConnectionError::Fatal)? {
            if frame.tag != b'p' {
                return Err(ConnectionError::Fatal(ErrorReport::protocol(format!(
                    "expected SASL response, got message type {}",
                    frame.tag
                ))));
            }
            return Ok(frame.body.to_vec());
        }
        connection.wait_until(deadline)?;
        if connection.input.fill(&mut connection.channel, Wait::Yes)? == Filled::Closed {
            return Err(closed().into());
        }
    }
}
