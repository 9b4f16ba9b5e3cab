//! The client's side of being asked who it is: what to answer to each `Authentication...` message.
//!
//! ```text
//!   R 10, mechanisms           ──►   p  the mechanism, first message       (scram.rs; bound, if it can be)
//!   R 11, the server's first   ──►   p  proof
//!   R 12, the server's proof         nothing; only then is R 0 believed
//!   R 0                              let in
//!   Z                                a session, if there was an R 0
//! ```
//!
//! Nothing else is answered: a password is sent to nobody, not even as MD5. And nothing is answered twice: who
//! asks for a second exchange may want an unbound proof of a password of which it has got a bound one.
//!
//! Whether a proof is bound (`fe-auth-scram.c`):
//!
//! | the server's certificate | and offered is `SCRAM-SHA-256-PLUS` | and it is not        |
//! |--------------------------|-------------------------------------|----------------------|
//! | none: not encrypted      | no, `n,,`                           | no, `n,,`            |
//! | has a hash               | yes                                 | no, and says so, `y,,` |
//! | has none                 | the server is not believed          | no, and says so, `y,,` |
//!
//! `y,,` is refused by a server that has offered it: then somebody in between has left it out, or has shown a
//! certificate of another kind.

use std::fmt;
use std::io;
use std::str::FromStr;

use crate::passfile::PassfileError;
use crate::scram::{ClientBinding, ClientExchange, MECHANISM, MECHANISM_PLUS};
use crate::tls::EndPoint;

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

/// Whether a proof is bound to the server's certificate, libpq's `channel_binding`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BindingMode {
    Disable,
    /// If the server offers it.
    #[default]
    Prefer,
    /// Or nobody is believed: not without TLS, nor a server that asks for no password.
    Require,
}

impl BindingMode {
    const ALL: [(BindingMode, &str); 3] = [
        (BindingMode::Disable, "disable"),
        (BindingMode::Prefer, "prefer"),
        (BindingMode::Require, "require"),
    ];
}

impl fmt::Display for BindingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = BindingMode::ALL.iter().find(|(mode, _)| mode == self);
        f.write_str(known.map_or("", |(_, name)| name))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid channel_binding \"{0}\": expected disable, prefer or require")]
pub struct BindingModeError(String);

impl FromStr for BindingMode {
    type Err = BindingModeError;

    fn from_str(text: &str) -> Result<BindingMode, BindingModeError> {
        let known = BindingMode::ALL.iter().find(|(_, name)| *name == text);
        known
            .map(|(mode, _)| *mode)
            .ok_or_else(|| BindingModeError(text.to_owned()))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    #[error("a password is asked for, and none is known")]
    NoPassword,
    #[error("a password is asked for: {0}")]
    Passfile(#[from] PassfileError),
    #[error("authentication by {0} is asked for; only {MECHANISM} is supported, and trust")]
    Method(&'static str),
    #[error("authentication request {0} is not supported")]
    Unknown(u32),
    #[error("invalid authentication request")]
    Malformed,
    #[error(
        "authentication request {0} out of turn: there is one exchange, of 10, 11 and 12, and then 0"
    )]
    OutOfTurn(u32),
    #[error("the server did not prove that it knows the password: {0}")]
    NotProved(io::Error),
    #[error("the server let us in without proving that it knows the password")]
    Skipped,
    #[error("the server begins a session without having let us in")]
    NotLetIn,
    #[error(
        "channel_binding=require, and there is nothing to bind to: the connection is not encrypted, or the \
         server's certificate is signed in a way for which binding is not defined"
    )]
    NothingToBindTo,
    #[error(
        "the server offers {MECHANISM_PLUS}, and its certificate is signed in a way for which binding is not \
         defined: somebody may stand in between; channel_binding=disable does without"
    )]
    NoHash,
    #[error("channel_binding=require, and the server does not offer {MECHANISM_PLUS}")]
    BindingNotOffered,
    #[error("channel_binding=require, and the server let us in without asking for a password")]
    NotBound,
}

/// What to answer one server.
#[derive(Debug)]
pub struct Login {
    /// An error is one only if a password is asked for.
    password: Result<Option<Password>, PassfileError>,
    end_point: EndPoint,
    binding: BindingMode,
    progress: Progress,
}

#[derive(Debug)]
enum Progress {
    NotAsked,
    Asked(ClientExchange),
    /// The server has proved that it knows the password.
    Proved,
    LetIn,
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
    /// `end_point` is that of the server's certificate.
    pub fn new(password: Option<Password>, end_point: EndPoint, binding: BindingMode) -> Login {
        Login::with(Ok(password), end_point, binding)
    }

    pub(crate) fn with(
        password: Result<Option<Password>, PassfileError>,
        end_point: EndPoint,
        binding: BindingMode,
    ) -> Login {
        Login {
            password,
            end_point,
            binding,
            progress: Progress::NotAsked,
        }
    }

    /// `body` of a message `R`.
    pub fn on_request(&mut self, body: &[u8]) -> Result<LoginStep, LoginError> {
        let (code, data) = body.split_first_chunk::<4>().ok_or(LoginError::Malformed)?;
        let code = u32::from_be_bytes(*code);
        match (code, &mut self.progress) {
            (0, Progress::Asked(_)) => Err(LoginError::Skipped),
            // What was proved was bound: else `begin` has refused.
            (0, Progress::NotAsked) if self.binding == BindingMode::Require => {
                Err(LoginError::NotBound)
            }
            (0, Progress::NotAsked | Progress::Proved) => {
                self.progress = Progress::LetIn;
                Ok(LoginStep::LetIn)
            }
            (3, _) => Err(LoginError::Method("cleartext password")),
            (5, _) => Err(LoginError::Method("MD5")),
            (7 | 8, _) => Err(LoginError::Method("GSSAPI")),
            (10, Progress::NotAsked) => self.begin(data),
            (11, Progress::Asked(exchange)) => {
                exchange
                    .on_server_first(data)
                    .map_err(LoginError::NotProved)?;
                Ok(LoginStep::Answer(exchange.message().to_vec()))
            }
            (12, Progress::Asked(exchange)) => {
                exchange
                    .on_server_final(data)
                    .map_err(LoginError::NotProved)?;
                self.progress = Progress::Proved;
                Ok(LoginStep::Nothing)
            }
            (0 | 10..=12, _) => Err(LoginError::OutOfTurn(code)),
            (code, _) => Err(LoginError::Unknown(code)),
        }
    }

    /// The server says that a session begins.
    pub fn finish(self) -> Result<(), LoginError> {
        match self.progress {
            Progress::LetIn => Ok(()),
            _ => Err(LoginError::NotLetIn),
        }
    }

    fn begin(&mut self, mechanisms: &[u8]) -> Result<LoginStep, LoginError> {
        let offers = |wanted: &str| {
            let mut offered = mechanisms.split(|byte| *byte == 0);
            offered.any(|name| name == wanted.as_bytes())
        };
        let is_required = self.binding == BindingMode::Require;
        let is_offered = offers(MECHANISM_PLUS);
        let (mechanism, binding) = match &self.end_point {
            _ if self.binding == BindingMode::Disable => (MECHANISM, ClientBinding::Impossible),
            EndPoint::Clear | EndPoint::NoHash if is_required => {
                return Err(LoginError::NothingToBindTo);
            }
            EndPoint::Clear => (MECHANISM, ClientBinding::Impossible),
            EndPoint::NoHash if is_offered => return Err(LoginError::NoHash),
            EndPoint::Hash(hash) if is_offered => {
                (MECHANISM_PLUS, ClientBinding::EndPoint(hash.clone()))
            }
            EndPoint::Hash(_) if is_required => return Err(LoginError::BindingNotOffered),
            EndPoint::NoHash | EndPoint::Hash(_) => (MECHANISM, ClientBinding::NotOffered),
        };
        if !offers(mechanism) {
            return Err(LoginError::Method("another SASL mechanism"));
        }
        let password = std::mem::replace(&mut self.password, Ok(None));
        let Some(Password(password)) = password? else {
            return Err(LoginError::NoPassword);
        };
        let exchange = ClientExchange::begin(&password, binding);
        let first = exchange.message();
        let mut answer = format!("{mechanism}\0").into_bytes();
        let len = u32::try_from(first.len()).map_err(|_| LoginError::Malformed)?;
        answer.extend_from_slice(&len.to_be_bytes());
        answer.extend_from_slice(first);
        self.progress = Progress::Asked(exchange);
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
        Login::new(password, EndPoint::Clear, BindingMode::Prefer)
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
        let again = login.on_request(&request(0, b""));
        assert!(matches!(again, Err(LoginError::OutOfTurn(0))), "{again:?}");
        login.finish().expect("a session");
    }

    /// A session that begins without more, at whatever moment, is nobody's.
    #[test]
    fn no_session_begins_before_we_are_let_in() {
        let refused = |login: Login| {
            let begun = login.finish();
            assert!(matches!(begun, Err(LoginError::NotLetIn)), "{begun:?}");
        };
        refused(login(Some("secret")));
        let mut asked = login(Some("secret"));
        let first = answer(asked.on_request(&request(10, OFFER)));
        let verifier = Verifier::of_password("secret");
        let first = &first[MECHANISM.len() + 5..];
        let server = ServerExchange::begin(verifier, true, MECHANISM.as_bytes(), None, first);
        let server = server.expect("sound");
        let mut proved = asked;
        let server_first = request(11, server.server_first().as_bytes());
        let proof = answer(proved.on_request(&server_first));
        let last = server.finish(&proof).expect("sound").expect("right");
        let step = proved.on_request(&request(12, last.as_bytes()));
        assert_eq!(step.expect("proved"), LoginStep::Nothing);
        refused(proved);
        let mut asked = login(Some("secret"));
        answer(asked.on_request(&request(10, OFFER)));
        refused(asked);
    }

    #[test]
    fn a_password_file_matters_when_a_password_is_asked_for() {
        let unreadable = || PassfileError::Permissions {
            path: "/pgpass".into(),
            mode: 0o666,
        };
        let new = || Login::with(Err(unreadable()), EndPoint::Clear, BindingMode::Prefer);
        let mut trusted = new();
        let step = trusted.on_request(&request(0, b""));
        assert_eq!(step.expect("let in"), LoginStep::LetIn);
        let refused = new().on_request(&request(10, OFFER)).expect_err("asked");
        assert!(refused.to_string().contains("/pgpass"), "{refused}");
    }

    /// What a client that sees this certificate makes of a server that has that one.
    #[test]
    fn proofs_are_bound_as_demanded() {
        use BindingMode::{Disable, Prefer, Require};
        const PLAIN: &[u8] = b"SCRAM-SHA-256\0\0";
        let hash = |name: &str| EndPoint::Hash(name.as_bytes().to_vec());
        let (ours, others) = (hash("ours"), hash("others"));
        let (clear, no_hash) = (EndPoint::Clear, EndPoint::NoHash);
        let own = Some(&b"ours"[..]);
        for (mode, seen, own, offer, wanted) in [
            (Prefer, &ours, own, OFFER, Ok(MECHANISM_PLUS)),
            (Prefer, &clear, None, PLAIN, Ok(MECHANISM)),
            // A certificate for which binding is not defined is no reason to stay away; another one is.
            (Prefer, &ours, None, PLAIN, Ok(MECHANISM)),
            (Prefer, &no_hash, None, PLAIN, Ok(MECHANISM)),
            (Prefer, &ours, own, PLAIN, Err("thinks the server does not")),
            (
                Prefer,
                &no_hash,
                own,
                PLAIN,
                Err("thinks the server does not"),
            ),
            (Prefer, &no_hash, own, OFFER, Err("somebody may stand")),
            (
                Prefer,
                &others,
                own,
                OFFER,
                Err("channel binding is not that"),
            ),
            (Disable, &ours, own, OFFER, Ok(MECHANISM)),
            (Disable, &others, own, OFFER, Ok(MECHANISM)),
            (Disable, &no_hash, own, OFFER, Ok(MECHANISM)),
            (Require, &ours, own, OFFER, Ok(MECHANISM_PLUS)),
            (
                Require,
                &others,
                own,
                OFFER,
                Err("channel binding is not that"),
            ),
            (Require, &ours, None, PLAIN, Err("does not offer")),
            (Require, &clear, own, OFFER, Err("nothing to bind to")),
            (Require, &no_hash, own, OFFER, Err("nothing to bind to")),
        ] {
            let password = Some(Password::new("secret".to_owned()));
            let mut login = Login::new(password, seen.clone(), mode);
            let found = (|| {
                let first = match login.on_request(&request(10, offer)) {
                    Ok(LoginStep::Answer(first)) => first,
                    other => return Err(other.expect_err("an answer or an error").to_string()),
                };
                let (mechanism, first) =
                    first.split_at(first.iter().position(|byte| *byte == 0).expect("a name"));
                let verifier = Verifier::of_password("secret");
                let server = ServerExchange::begin(verifier, true, mechanism, own, &first[5..])
                    .map_err(|report| report.detail.unwrap_or_default())?;
                let proof =
                    answer(login.on_request(&request(11, server.server_first().as_bytes())));
                let last = server
                    .finish(&proof)
                    .map_err(|report| report.detail.unwrap_or_default())?
                    .expect("the right password");
                let step = login.on_request(&request(12, last.as_bytes()));
                assert_eq!(step.expect("proved"), LoginStep::Nothing);
                let step = login.on_request(&request(0, b""));
                assert_eq!(step.expect("let in"), LoginStep::LetIn);
                Ok(String::from_utf8(mechanism.to_vec()).expect("text"))
            })();
            match (found, wanted) {
                (Ok(found), Ok(wanted)) => assert_eq!(found, wanted, "{mode} {seen:?} {own:?}"),
                (Err(found), Err(wanted)) => assert!(found.contains(wanted), "{mode}: {found}"),
                (found, wanted) => panic!("{mode} {seen:?} {own:?}: {found:?}, not {wanted:?}"),
            }
        }
        let mut trusted = Login::new(None, ours, Require);
        let let_in = trusted.on_request(&request(0, b""));
        assert!(matches!(let_in, Err(LoginError::NotBound)), "{let_in:?}");
    }

    /// Whoever has got a proof, or a beginning, does not get another that is less bound.
    #[test]
    fn there_is_one_exchange() {
        let new = || {
            let password = Some(Password::new("secret".to_owned()));
            let hash = EndPoint::Hash(b"ours".to_vec());
            Login::new(password, hash, BindingMode::Prefer)
        };
        let again = |login: &mut Login| {
            for offer in [OFFER, b"SCRAM-SHA-256\0\0"] {
                let refused = login.on_request(&request(10, offer));
                assert!(
                    matches!(refused, Err(LoginError::OutOfTurn(10))),
                    "{refused:?}"
                );
            }
        };
        let mut login = new();
        let first = answer(login.on_request(&request(10, OFFER)));
        again(&mut login);
        let server = ServerExchange::begin(
            Verifier::of_password("secret"),
            true,
            MECHANISM_PLUS.as_bytes(),
            Some(b"ours"),
            &first[MECHANISM_PLUS.len() + 5..],
        )
        .expect("sound");
        let proof = answer(login.on_request(&request(11, server.server_first().as_bytes())));
        again(&mut login);
        let last = server.finish(&proof).expect("sound").expect("right");
        let step = login.on_request(&request(12, last.as_bytes()));
        assert_eq!(step.expect("proved"), LoginStep::Nothing);
        again(&mut login);
        for (code, message) in [(11, "r=x,s=AAAA,i=1"), (12, last.as_str())] {
            let second = login.on_request(&request(code, message.as_bytes()));
            assert!(
                matches!(second, Err(LoginError::OutOfTurn(_))),
                "{second:?}"
            );
        }
        // Nor is an exchange over that has only begun.
        let mut login = new();
        answer(login.on_request(&request(10, OFFER)));
        let early = login.on_request(&request(12, last.as_bytes()));
        assert!(matches!(early, Err(LoginError::NotProved(_))), "{early:?}");
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
