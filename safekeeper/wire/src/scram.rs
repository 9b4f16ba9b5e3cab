//! Passwords that are not sent: SCRAM-SHA-256, both ends. (RFC 5802, RFC 7677; `libpq/auth-scram.c`)
//!
//! ```text
//!   client                                         server
//!     n,,n=user,r=NONCE                      ──►
//!                                            ◄──     r=NONCE MORE,s=SALT,i=ITERATIONS
//!     c=biws,r=NONCE MORE,p=PROOF            ──►
//!                                            ◄──     v=SIGNATURE
//! ```
//!
//! The server keeps a *verifier*, of which neither the password nor what proves it can be made:
//!
//! ```text
//!   SCRAM-SHA-256$4096:SALT$STORED KEY:SERVER KEY          base64, as in pg_authid.rolpassword
//! ```
//!
//! Who is unknown is asked all the same, with a salt that is always the same for the same name, so that
//! nobody learns who is known. The name in the first message does not count: that of the startup packet does.
//!
//! On an encrypted connection the proof can be bound to the server's certificate (`tls-server-end-point`, RFC
//! 5929), so that whoever stands between the two, with another certificate, can't pass it on:
//! `SCRAM-SHA-256-PLUS`. Then the first message begins with `p=tls-server-end-point,,`, and `c=` of the last
//! one has this and a hash of the certificate. A client that could have done so, and was not offered it, says
//! so by `y,,`; if it was offered, somebody has left it out of what the client saw, and that is the end.

use std::fmt;
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use postgres_protocol::password::scram_sha_256;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::pgwire::ErrorReport;

/// The name under which it is offered.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// The same, bound to the server's certificate.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// First message of who binds the proof to the certificate.
const GS2_BOUND: &str = "p=tls-server-end-point,,";

/// As Postgres's `scram_iterations` by default.
const ITERATIONS: u32 = 4096;

/// A verifier with more is none. Clients compute them, and find them with `scram_iterations` of Postgres.
const ITERATIONS_MAX: u32 = 1_000_000;

/// More is not computed for a server that asks for it: it would keep us busy for long, and `postgres-protocol`
/// does not do it.
const COMPUTED_ITERATIONS_MAX: u32 = 100_000;

const KEY_LEN: usize = 32;
type Key = [u8; KEY_LEN];

/// By which a server makes salts for users that there are not; its own, and always the same
/// (`mock_authentication_nonce` in `pg_control`).
pub type SaltKey = Key;

/// Random bytes in our half of a nonce (`SCRAM_RAW_NONCE_LEN`).
const NONCE_LEN: usize = 18;
const SALT_LEN: usize = 16;

/// Longest message of an exchange, in bytes: nonces and proofs are a hundred.
pub const SCRAM_LEN_MAX: usize = 1024;

/// What a server knows of a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

/// Not what is in it: logs are read by many.
impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MECHANISM}${}:...", self.iterations)
    }
}

impl Verifier {
    /// With a random salt. The password is prepared as Postgres does it (SASLprep, or as it is).
    pub fn of_password(password: &str) -> Verifier {
        Verifier::parse(&scram_sha_256(password.as_bytes())).expect("it has the form of one")
    }

    /// `None`: it is not a verifier.
    pub fn parse(text: &str) -> Option<Verifier> {
        let (iterations, rest) = text
            .strip_prefix(MECHANISM)?
            .strip_prefix('$')?
            .split_once(':')?;
        let (salt, keys) = rest.split_once('$')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let iterations = iterations.parse().ok()?;
        let salt = STANDARD.decode(salt).ok()?;
        let is_sane = (1..=ITERATIONS_MAX).contains(&iterations) && !salt.is_empty();
        is_sane.then_some(Verifier {
            iterations,
            salt,
            stored_key: decode_key(stored_key)?,
            server_key: decode_key(server_key)?,
        })
    }

    /// The text that is kept.
    pub fn to_text(&self) -> String {
        format!(
            "{MECHANISM}${}:{}${}:{}",
            self.iterations,
            STANDARD.encode(&self.salt),
            STANDARD.encode(self.stored_key),
            STANDARD.encode(self.server_key)
        )
    }

    /// For a user that there is not: nothing proves it, and it looks as any other.
    pub fn of_nobody(user: &str, key: &SaltKey) -> Verifier {
        let salt = hmac(key, user.as_bytes())[..SALT_LEN].to_vec();
        Verifier {
            iterations: ITERATIONS,
            salt,
            stored_key: hmac(key, b"stored"),
            server_key: hmac(key, b"server"),
        }
    }
}

fn decode_key(text: &str) -> Option<Key> {
    STANDARD.decode(text).ok()?.try_into().ok()
}

fn hmac(key: &[u8], message: &[u8]) -> Key {
    let mut mac = <Hmac<Sha256> as KeyInit>::new_from_slice(key).expect("any length will do");
    mac.update(message);
    mac.finalize().into_bytes().into()
}

/// Random bytes of the operating system.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(io::Error::from)?;
    Ok(bytes)
}

/// The server's end of an exchange that has begun.
#[derive(Debug)]
pub struct ServerExchange {
    verifier: Verifier,
    is_known: bool,
    /// What `c=` of the last message must be.
    binding: Vec<u8>,
    client_first_bare: String,
    server_first: String,
    /// Both halves.
    nonce: String,
}

impl ServerExchange {
    /// Takes the client's first message, for the mechanism that it has chosen. `is_known`: the verifier is of
    /// a user that there is. `end_point`: what the client sees of our certificate; then the bound mechanism
    /// has been offered, too.
    pub fn begin(
        verifier: Verifier,
        is_known: bool,
        mechanism: &[u8],
        end_point: Option<&[u8]>,
        client_first: &[u8],
    ) -> Result<ServerExchange, ErrorReport> {
        let own_half = random::<NONCE_LEN>().map_err(|error| {
            ErrorReport::new("XX000", "could not make a nonce").detail(error.to_string())
        })?;
        let message = text(client_first)?;
        let (binding, bare) = match end_point {
            Some(hash) if mechanism == MECHANISM_PLUS.as_bytes() => {
                let bare = message.strip_prefix(GS2_BOUND).ok_or_else(|| {
                    malformed("The first message does not bind the proof to the certificate.")
                })?;
                ([GS2_BOUND.as_bytes(), hash].concat(), bare)
            }
            offered if mechanism == MECHANISM.as_bytes() => unbound(message, offered.is_some())?,
            _ => {
                return Err(ErrorReport::protocol(
                    "client selected an invalid SASL authentication mechanism",
                ));
            }
        };
        let own_half = STANDARD.encode(own_half);
        ServerExchange::begin_with(verifier, is_known, binding, bare, &own_half)
    }

    fn begin_with(
        verifier: Verifier,
        is_known: bool,
        binding: Vec<u8>,
        bare: &str,
        own_half: &str,
    ) -> Result<ServerExchange, ErrorReport> {
        let mut attributes = bare.split(',');
        let names_user = attributes.next().is_some_and(|user| user.starts_with("n="));
        let nonce = attributes
            .next()
            .and_then(|nonce| nonce.strip_prefix("r="))
            .filter(|nonce| is_nonce(nonce));
        let (true, Some(client_half)) = (names_user, nonce) else {
            return Err(malformed("The first message has no user or no nonce."));
        };
        let nonce = format!("{client_half}{own_half}");
        let server_first = format!(
            "r={nonce},s={},i={}",
            STANDARD.encode(&verifier.salt),
            verifier.iterations
        );
        Ok(ServerExchange {
            verifier,
            is_known,
            binding,
            client_first_bare: bare.to_owned(),
            server_first,
            nonce,
        })
    }

    /// What the client is sent.
    pub fn server_first(&self) -> &str {
        &self.server_first
    }

    /// Takes the client's proof. The server's last message if it is one; `None`: the password is another.
    pub fn finish(self, client_final: &[u8]) -> Result<Option<String>, ErrorReport> {
        let message = text(client_final)?;
        let (without_proof, proof) = message
            .rsplit_once(",p=")
            .ok_or_else(|| malformed("The last message has no proof."))?;
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|c| c.strip_prefix("c="));
        if binding != Some(STANDARD.encode(&self.binding).as_str()) {
            return Err(malformed(
                "The channel binding is not that of the first message.",
            ));
        }
        let nonce = attributes.next().and_then(|r| r.strip_prefix("r="));
        if nonce != Some(self.nonce.as_str()) {
            return Err(malformed("The nonce is another one."));
        }
        let proof = decode_key(proof).ok_or_else(|| malformed("The proof is none."))?;
        let auth_message = format!(
            "{},{},{without_proof}",
            self.client_first_bare, self.server_first
        );
        let Verifier {
            stored_key,
            server_key,
            ..
        } = &self.verifier;
        let mut client_key = hmac(stored_key, auth_message.as_bytes());
        for (byte, proof) in client_key.iter_mut().zip(proof) {
            *byte ^= proof;
        }
        let computed: Key = Sha256::digest(client_key).into();
        let is_right = bool::from(computed.ct_eq(stored_key));
        let signature = STANDARD.encode(hmac(server_key, auth_message.as_bytes()));
        Ok((is_right && self.is_known).then(|| format!("v={signature}")))
    }
}

/// What the last message must repeat, and the rest of the first, of a client that does not bind its proof.
fn unbound(message: &str, was_offered: bool) -> Result<(Vec<u8>, &str), ErrorReport> {
    if let Some(bare) = message.strip_prefix("n,,") {
        Ok((b"n,,".to_vec(), bare))
    } else if message.starts_with("y,,") && was_offered {
        Err(malformed(
            "The client supports SCRAM channel binding but thinks the server does not. However, this server \
             does support channel binding.",
        ))
    } else if let Some(bare) = message.strip_prefix("y,,") {
        Ok((b"y,,".to_vec(), bare))
    } else if message.starts_with("p=") {
        Err(malformed(
            "The client selected SCRAM-SHA-256 without channel binding, but binds its proof.",
        ))
    } else {
        Err(malformed("The first message does not begin as one."))
    }
}

/// Printable, and no comma (RFC 5802, `printable`).
fn is_nonce(text: &str) -> bool {
    !text.is_empty()
        && text
            .bytes()
            .all(|byte| (0x21..=0x7E).contains(&byte) && byte != b',')
}

fn text(message: &[u8]) -> Result<&str, ErrorReport> {
    let is_short = message.len() <= SCRAM_LEN_MAX;
    let text = std::str::from_utf8(message).ok().filter(|_| is_short);
    text.ok_or_else(|| malformed("It is too long, or no text."))
}

fn malformed(detail: &str) -> ErrorReport {
    ErrorReport::protocol("malformed SCRAM message").detail(detail)
}

/// What a client's proof is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientBinding {
    /// Nothing: the connection is not encrypted, or nobody wants it.
    Impossible,
    /// Nothing: the connection is encrypted, but the server has not offered it.
    NotOffered,
    /// The hash of the server's certificate.
    EndPoint(Vec<u8>),
}

/// The client's end.
pub struct ClientExchange {
    scram: ScramSha256,
}

/// Not the password.
impl fmt::Debug for ClientExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientExchange")
    }
}

impl ClientExchange {
    pub fn begin(password: &str, binding: ClientBinding) -> ClientExchange {
        let binding = match binding {
            ClientBinding::Impossible => ChannelBinding::unsupported(),
            ClientBinding::NotOffered => ChannelBinding::unrequested(),
            ClientBinding::EndPoint(hash) => ChannelBinding::tls_server_end_point(hash),
        };
        let scram = ScramSha256::new(password.as_bytes(), binding);
        ClientExchange { scram }
    }

    /// What is to be sent now.
    pub fn message(&self) -> &[u8] {
        self.scram.message()
    }

    /// Takes the server's first message, which must extend our nonce.
    pub fn on_server_first(&mut self, message: &[u8]) -> io::Result<()> {
        let iterations = std::str::from_utf8(message)
            .ok()
            .and_then(|text| text.rsplit_once(",i="))
            .and_then(|(_, iterations)| iterations.parse::<u32>().ok());
        match iterations {
            Some(iterations) if iterations <= COMPUTED_ITERATIONS_MAX => self.scram.update(message),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "the server asks for more than {COMPUTED_ITERATIONS_MAX} iterations, or for none"
                ),
            )),
        }
    }

    /// Takes the server's last message, which proves that it has the verifier of our password.
    pub fn on_server_final(&mut self, message: &[u8]) -> io::Result<()> {
        self.scram.finish(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn begin(
        verifier: &Verifier,
        is_known: bool,
        first: &[u8],
    ) -> Result<ServerExchange, ErrorReport> {
        ServerExchange::begin(
            verifier.clone(),
            is_known,
            MECHANISM.as_bytes(),
            None,
            first,
        )
    }

    fn exchange(password: &str, verifier: &Verifier, is_known: bool) -> Result<bool, ErrorReport> {
        let mut client = ClientExchange::begin(password, ClientBinding::Impossible);
        let server = begin(verifier, is_known, client.message())?;
        client
            .on_server_first(server.server_first().as_bytes())
            .expect("our own");
        let Some(server_final) = server.finish(client.message())? else {
            return Ok(false);
        };
        client
            .on_server_final(server_final.as_bytes())
            .expect("our own");
        Ok(true)
    }

    #[test]
    fn the_right_password_and_no_other_is_proved() {
        for password in ["secret", "", "p\u{e4}ss w\u{f6}rd", "\u{a0}\u{2168}"] {
            let verifier = Verifier::of_password(password);
            assert_eq!(exchange(password, &verifier, true), Ok(true), "{password}");
            assert_eq!(exchange("another", &verifier, true), Ok(false));
            assert_eq!(exchange(password, &verifier, false), Ok(false));
        }
        let nobody = Verifier::of_nobody("nobody", &[7; 32]);
        assert_eq!(exchange("secret", &nobody, false), Ok(false));
        assert_eq!(nobody, Verifier::of_nobody("nobody", &[7; 32]));
        assert_ne!(nobody.salt, Verifier::of_nobody("somebody", &[7; 32]).salt);
    }

    /// The example of RFC 7677, section 3.
    #[test]
    fn the_exchange_of_the_standard() {
        let salt = STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").expect("base64");
        let mut salted = hmac(b"pencil", &[&salt[..], &[0, 0, 0, 1]].concat());
        let mut last = salted;
        for _ in 1..4096 {
            last = hmac(b"pencil", &last);
            for (byte, more) in salted.iter_mut().zip(last) {
                *byte ^= more;
            }
        }
        let verifier = Verifier {
            iterations: 4096,
            salt,
            stored_key: Sha256::digest(hmac(&salted, b"Client Key")).into(),
            server_key: hmac(&salted, b"Server Key"),
        };
        assert_eq!(Verifier::parse(&verifier.to_text()), Some(verifier.clone()));
        let server = ServerExchange::begin_with(
            verifier,
            true,
            b"n,,".to_vec(),
            "n=user,r=rOprNGfwEbeRWgbNEkqO",
            "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0",
        )
        .expect("a first message");
        assert_eq!(
            server.server_first(),
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let last = server.finish(
            b"c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
              p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=",
        );
        assert_eq!(
            last,
            Ok(Some(
                "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=".to_owned()
            ))
        );
    }

    #[test]
    fn whoever_tampers_is_noticed() {
        let verifier = Verifier::of_password("secret");
        let begin = |first: &[u8]| begin(&verifier, true, first);
        for first in [
            &b""[..],
            b"n,,",
            b"n,,n=u",
            b"n,,n=u,r=",
            b"n,,n=u,r=a b",
            b"n,,r=abc,n=u",
            b"n,a=x,n=u,r=abc",
            b"p=tls-server-end-point,,n=u,r=abc",
            b"\xFF,,n=u,r=abc",
            &[b'n'; SCRAM_LEN_MAX + 1],
        ] {
            assert!(begin(first).is_err(), "{first:?}");
        }
        let last = |client: &mut ClientExchange, change: &dyn Fn(String) -> String| {
            let server = begin(client.message()).expect("sound");
            let first = server.server_first().to_owned();
            client.on_server_first(first.as_bytes()).expect("sound");
            let message = String::from_utf8(client.message().to_vec()).expect("text");
            server.finish(change(message).as_bytes())
        };
        let new = || ClientExchange::begin("secret", ClientBinding::Impossible);
        assert!(matches!(last(&mut new(), &|m| m), Ok(Some(_))));
        assert!(last(&mut new(), &|m| m.replace("c=biws", "c=eSws")).is_err());
        assert!(last(&mut new(), &|m| m.replacen(",r=", ",r=x", 1)).is_err());
        assert!(
            last(&mut new(), &|m| m
                .split(",p=")
                .next()
                .unwrap_or_default()
                .to_owned())
            .is_err()
        );
        assert!(last(&mut new(), &|m| m.replace(",p=", ",x=1,p=")).is_ok_and(|v| v.is_none()));
        // What was said in another exchange proves nothing in this one.
        let mut before = new();
        let mut said = String::new();
        let server = begin(before.message()).expect("sound");
        before
            .on_server_first(server.server_first().as_bytes())
            .expect("sound");
        said.push_str(std::str::from_utf8(before.message()).expect("text"));
        assert!(last(&mut new(), &|_| said.clone()).is_err());
    }

    /// Over TLS the proof holds for one certificate; and what was offered cannot be taken away unnoticed.
    #[test]
    fn a_proof_is_bound_to_the_certificate() {
        let verifier = Verifier::of_password("secret");
        let run = |binding: ClientBinding, mechanism: &str, ours: Option<&[u8]>| {
            let mut client = ClientExchange::begin("secret", binding);
            let server = ServerExchange::begin(
                verifier.clone(),
                true,
                mechanism.as_bytes(),
                ours,
                client.message(),
            )?;
            let first = server.server_first().as_bytes().to_vec();
            client.on_server_first(&first).expect("our own");
            server.finish(client.message())
        };
        let (hash, other) = (vec![1; 32], vec![2; 32]);
        let bound = || ClientBinding::EndPoint(hash.clone());
        let right = run(bound(), MECHANISM_PLUS, Some(&hash)).expect("sound");
        assert!(right.is_some());
        assert!(run(bound(), MECHANISM_PLUS, Some(&other)).is_err());
        assert!(run(bound(), MECHANISM_PLUS, None).is_err());
        assert!(run(bound(), MECHANISM, Some(&hash)).is_err());
        let unbound = |binding, ours| run(binding, MECHANISM, ours);
        assert!(unbound(ClientBinding::NotOffered, None).is_ok());
        assert!(unbound(ClientBinding::NotOffered, Some(&hash)).is_err());
        assert!(unbound(ClientBinding::Impossible, Some(&hash)).is_ok());
        assert!(run(ClientBinding::Impossible, MECHANISM_PLUS, Some(&hash)).is_err());
        assert!(run(ClientBinding::Impossible, "PLAIN", Some(&hash)).is_err());
    }

    #[test]
    fn a_server_that_is_not_ours_is_noticed() {
        let mut client = ClientExchange::begin("secret", ClientBinding::Impossible);
        assert!(client.on_server_first(b"r=other,s=AAAA,i=4096").is_err());
        let mut client = ClientExchange::begin("secret", ClientBinding::Impossible);
        let nonce = String::from_utf8(client.message()[3..].to_vec()).expect("text");
        let nonce = nonce.split("r=").nth(1).expect("a nonce").to_owned();
        let many = format!("r={nonce}x,s=AAAA,i=100001");
        let refused = client.on_server_first(many.as_bytes()).expect_err("many");
        assert!(refused.to_string().contains("100000"), "{refused}");
        client
            .on_server_first(format!("r={nonce}x,s=AAAA,i=1").as_bytes())
            .expect("it may be");
        let forged = format!("v={}", STANDARD.encode([0; 32]));
        assert!(client.on_server_final(forged.as_bytes()).is_err());
    }

    #[test]
    fn what_is_no_verifier_is_none() {
        let text = Verifier::of_password("secret").to_text();
        assert!(Verifier::parse(&text).is_some());
        assert!(Verifier::parse(&text.replace("$4096:", "$1000000:")).is_some());
        for text in [
            "",
            "md5abc",
            "SCRAM-SHA-256$4096:AAAA$AAAA:AAAA",
            &text[..text.len() - 4],
            &text.replace("$4096:", "$0:"),
            &text.replace("$4096:", "$1000001:"),
            &text.replace("$4096:", "$-1:"),
        ] {
            assert_eq!(Verifier::parse(text), None, "{text}");
        }
        assert!(!format!("{:?}", Verifier::parse(&text)).contains(&text[30..]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(first in proptest::collection::vec(any::<u8>(), 0..200),
            last in proptest::collection::vec(any::<u8>(), 0..200), text in ".{0,100}") {
            let verifier = Verifier::of_nobody("u", &[1; 32]);
            let _ = begin(&verifier, true, &first);
            let exchange = begin(&verifier, true, b"n,,n=u,r=abc").expect("sound");
            prop_assert!(!matches!(exchange.finish(&last), Ok(Some(_))));
            let _ = Verifier::parse(&text);
            let _ = ClientExchange::begin("x", ClientBinding::Impossible).on_server_first(&first);
            let _ = ClientExchange::begin("x", ClientBinding::Impossible).on_server_final(&last);
        }
    }
}
