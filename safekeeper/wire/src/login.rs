//! The client's side of being asked who it is: what to answer to each `Authentication...` message.
//!
//! ```text
//!   R 10, mechanisms           ──►   p  the mechanism, first message       (scram.rs; bound, if it can be)
//!   R 11, the server's first   ──►   p  proof
//!   R 12, the server's proof         nothing; only then is R 0 believed
//!   R 0                              let in
//! ```
//!
//! Nothing else is answered: a password is sent to nobody, not even as MD5.

use std::fmt;
use std::io;

use crate::scram::{ClientBinding, ClientExchange, MECHANISM, MECHANISM_PLUS};

/// A password that does not show in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    pub fn new(password: String) -> Password {
        Password(password)
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(...)")
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    #[error("a password is asked for, and none is known")]
    NoPassword,
    #[error("authentication by {0} is asked for; only {MECHANISM} is supported, and trust")]
    Method(&'static str),
    #[error("authentication request {0} is not supported")]
    Unknown(u32),
    #[error("invalid authentication request")]
    Malformed,
    #[error("the server did not prove that it knows the password: {0}")]
    NotProved(io::Error),
    #[error("the server let us in without proving that it knows the password")]
    Skipped,
}

/// An exchange that may be under way.
#[derive(Debug)]
pub struct Login {
    password: Option<Password>,
    end_point: Option<Vec<u8>>,
    exchange: Option<ClientExchange>,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub enum LoginStep {
    LetIn,
    /// The body of a message `p`.
    Answer(Vec<u8>),
    /// The server goes on by itself.
    Nothing,
}

impl Login {
    /// `end_point` is the hash of the server's certificate (tls.rs), `None` without one.
    pub fn new(password: Option<Password>, end_point: Option<Vec<u8>>) -> Login {
        Login {
            password,
            end_point,
            exchange: None,
        }
    }

    /// `body` of a message `R`.
    pub fn on_request(&mut self, body: &[u8]) -> Result<LoginStep, LoginError> {
        let (code, data) = body.split_first_chunk::<4>().ok_or(LoginError::Malformed)?;
        match u32::from_be_bytes(*code) {
            0 if self.exchange.is_some() => Err(LoginError::Skipped),
            0 => Ok(LoginStep::LetIn),
            3 => Err(LoginError::Method("cleartext password")),
            5 => Err(LoginError::Method("MD5")),
            7 | 8 => Err(LoginError::Method("GSSAPI")),
            10 => self.begin(data),
            11 => {
                let exchange = self.exchange.as_mut().ok_or(LoginError::Malformed)?;
                exchange
                    .on_server_first(data)
                    .map_err(LoginError::NotProved)?;
                Ok(LoginStep::Answer(exchange.message().to_vec()))
            }
            12 => {
                let mut exchange = self.exchange.take().ok_or(LoginError::Malformed)?;
                exchange
                    .on_server_final(data)
                    .map_err(LoginError::NotProved)?;
                Ok(LoginStep::Nothing)
            }
            code => Err(LoginError::Unknown(code)),
        }
    }

    fn begin(&mut self, mechanisms: &[u8]) -> Result<LoginStep, LoginError> {
        let offers = |wanted: &str| {
            let mut offered = mechanisms.split(|byte| *byte == 0);
            offered.any(|name| name == wanted.as_bytes())
        };
        let (mechanism, binding) = match self.end_point.take() {
            Some(hash) if offers(MECHANISM_PLUS) => (MECHANISM_PLUS, ClientBinding::EndPoint(hash)),
            Some(_) => (MECHANISM, ClientBinding::NotOffered),
            None => (MECHANISM, ClientBinding::Impossible),
        };
        if !offers(mechanism) {
            return Err(LoginError::Method("another SASL mechanism"));
        }
        let Some(Password(password)) = &self.password else {
            return Err(LoginError::NoPassword);
        };
        let exchange = ClientExchange::begin(password, binding);
        let first = exchange.message();
        let mut answer = format!("{mechanism}\0").into_bytes();
        let len = u32::try_from(first.len()).map_err(|_| LoginError::Malformed)?;
        answer.extend_from_slice(&len.to_be_bytes());
        answer.extend_from_slice(first);
        self.exchange = Some(exchange);
        Ok(LoginStep::Answer(answer))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scram::{ServerExchange, Verifier};

    fn request(code: u32, data: &[u8]) -> Vec<u8> {
        [&code.to_be_bytes()[..], data].concat()
    }

    fn answer(step: Result<LoginStep, LoginError>) -> Vec<u8> {
        match step {
            Ok(LoginStep::Answer(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    fn login(password: Option<&str>) -> Login {
        let password = password.map(|password| Password::new(password.to_owned()));
        Login::new(password, None)
    }

    const OFFER: &[u8] = b"SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0";

    #[test]
    fn a_server_that_knows_the_password_lets_in() {
        let mut login = login(Some("secret"));
        let first = answer(login.on_request(&request(10, OFFER)));
        let first = &first[MECHANISM.len() + 5..];
        let verifier = Verifier::of_password("secret");
        let server = ServerExchange::begin(verifier, true, MECHANISM.as_bytes(), None, first)
            .expect("sound");
        let request_11 = request(11, server.server_first().as_bytes());
        let proof = answer(login.on_request(&request_11));
        let last = server.finish(&proof).expect("sound").expect("right");
        let before = login.on_request(&request(0, b""));
        assert!(matches!(before, Err(LoginError::Skipped)));
        let step = login.on_request(&request(12, last.as_bytes()));
        assert_eq!(step.expect("proved"), LoginStep::Nothing);
        let step = login.on_request(&request(0, b""));
        assert_eq!(step.expect("let in"), LoginStep::LetIn);
    }

    #[test]
    fn what_cannot_be_answered_is_named() {
        let refusal = |code, data: &[u8]| {
            let refused = login(None).on_request(&request(code, data));
            refused.expect_err("refused").to_string()
        };
        assert!(refusal(10, OFFER).contains("none is known"));
        assert!(refusal(10, b"OAUTHBEARER\0\0").contains("another SASL"));
        assert!(refusal(3, b"").contains("cleartext"));
        assert!(refusal(5, b"salt").contains("MD5"));
        assert!(refusal(99, b"").contains("99"));
        refusal(11, b"r=x");
        refusal(12, b"v=x");
        assert!(matches!(
            login(None).on_request(b"\0\0"),
            Err(LoginError::Malformed)
        ));
        let trusted = login(Some("x")).on_request(&request(0, b""));
        assert_eq!(trusted.expect("let in"), LoginStep::LetIn);
        assert!(!format!("{:?}", Password::new("hunter2".into())).contains("hunter2"));
    }
}
