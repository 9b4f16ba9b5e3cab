//! Who the peer is: between the startup packet and the session. (`libpq/auth.c`, `libpq/auth-sasl.c`)
//!
//! ```text
//!   peer                                    here
//!     startup packet               ──►
//!                                           the rule for its address and name (access.rs)
//!                                  ◄──      AuthenticationSASL                 scram only
//!     SCRAM-SHA-256, first message ──►
//!                                  ◄──      salt, iterations, nonce
//!     proof                        ──►
//!                                  ◄──      signature; AuthenticationOk follows
//! ```
//!
//! A user that there is not is asked as any other, and told the same.

use std::time::Instant;

use safekeeper_wire::pgwire::{
    ConnectionError, ErrorReport, Filled, LEN_MAX_UNAUTHENTICATED, Wait, closed,
};
use safekeeper_wire::scram::{MECHANISM, ServerExchange, Verifier};

use crate::access::{Method, method_for};
use crate::connection::Connection;
use crate::users::Role;

/// What the peer may do, once it has shown who it is.
pub fn authenticate(
    connection: &mut Connection,
    deadline: Instant,
) -> Result<Vec<Role>, ConnectionError> {
    let shared = connection.shared.clone();
    let user = connection.startup.user.clone();
    let address = connection.peer().ip();
    let known = shared.users().find(&user).cloned();
    let refused = |what: &str| {
        ConnectionError::Fatal(ErrorReport::new(
            "28000",
            format!("{what} for host \"{address}\", user \"{user}\""),
        ))
    };
    match method_for(&shared.config.access, address, &user) {
        // Whoever is trusted without being known may do everything.
        Some(Method::Trust) => Ok(known.map_or(Role::ALL.to_vec(), |user| user.roles)),
        Some(Method::Reject) => Err(refused("access is rejected")),
        None => Err(refused("no access rule")),
        Some(Method::Scram) => {
            let (verifier, roles) = match &known {
                Some(user) => (user.verifier.clone(), user.roles.clone()),
                None => (Verifier::of_nobody(&user, &shared.secret), Vec::new()),
            };
            match ask(connection, deadline, verifier, known.is_some())? {
                true => Ok(roles),
                false => Err(ConnectionError::Fatal(ErrorReport::new(
                    "28P01",
                    format!("password authentication failed for user \"{user}\""),
                ))),
            }
        }
    }
}

/// Whether the peer has proved the password.
fn ask(
    connection: &mut Connection,
    deadline: Instant,
    verifier: Verifier,
    is_known: bool,
) -> Result<bool, ConnectionError> {
    connection.output.authentication_sasl(MECHANISM);
    connection.send()?;
    let first = next_answer(connection, deadline)?;
    let first = initial_response(&first).map_err(ConnectionError::Fatal)?;
    let exchange =
        ServerExchange::begin(verifier, is_known, first).map_err(ConnectionError::Fatal)?;
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

/// The mechanism's name, and behind a length its first message.
fn initial_response(body: &[u8]) -> Result<&[u8], ErrorReport> {
    let malformed = || ErrorReport::protocol("malformed SASLInitialResponse message");
    let end = body
        .iter()
        .position(|byte| *byte == 0)
        .ok_or_else(malformed)?;
    let (mechanism, rest) = (&body[..end], &body[end + 1..]);
    if mechanism != MECHANISM.as_bytes() {
        return Err(ErrorReport::protocol(
            "client selected an invalid SASL authentication mechanism",
        ));
    }
    let (len, data) = rest.split_first_chunk::<4>().ok_or_else(malformed)?;
    let is_whole = usize::try_from(u32::from_be_bytes(*len)) == Ok(data.len());
    is_whole.then_some(data).ok_or_else(malformed)
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
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ConnectionError::Fatal(ErrorReport::new(
                "08006",
                "canceling authentication due to timeout",
            )));
        }
        connection.socket.set_read_timeout(Some(left))?;
        if connection.input.fill(&connection.socket, Wait::Yes)? == Filled::Closed {
            return Err(closed().into());
        }
    }
}
