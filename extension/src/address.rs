//! Which safekeepers to dial: `walproposer.safekeepers`, a list of `host:port`.
//!
//! ```text
//!   sk1.example:5454, sk2.example:5454, [2001:db8::3]:5454
//! ```
//!
//! The port may be left out and is 5454 then. An IPv6 address stands in brackets. Whatever is wrong
//! is said with the entry that is wrong, since the list is written by hand.
//!
//! Not here: who answers at an address. Only a greeting tells which member that is.

use safekeeper_protocol::PeerAddress;

/// Port of a safekeeper that was not told otherwise.
pub const DEFAULT_PORT: u16 = 5454;

/// Longest host name in bytes, as in DNS; the configuration that members keep has the same limit.
const HOST_LEN_MAX: usize = safekeeper_protocol::Member::HOST_LEN_MAX;

/// As many as a configuration can hold.
const ADDRESSES_MAX: usize = safekeeper_protocol::Configuration::MEMBERS_MAX;

/// What is wrong with the list; the text names the entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("entry {0} of the list is empty")]
    Empty(usize),
    #[error("\"{0}\" has no host before the port")]
    NoHost(String),
    #[error("\"{0}\" is not of the form host:port")]
    Malformed(String),
    #[error("\"{0}\" has an invalid port: it must be a number from 1 to 65535")]
    Port(String),
    #[error("\"{0}\" is listed twice")]
    Duplicate(String),
    #[error("\"{0}\" has a host name of more than {HOST_LEN_MAX} bytes")]
    TooLong(String),
    #[error("the list has {0} entries, more than the {ADDRESSES_MAX} that are possible")]
    TooMany(usize),
}

/// Reads the list. Blanks around entries are allowed; an empty text is an empty list.
pub fn parse_addresses(text: &str) -> Result<Vec<PeerAddress>, AddressError> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let mut addresses: Vec<PeerAddress> = Vec::new();
    for (number, entry) in (1..).zip(text.split(',')) {
        let entry = entry.trim();
        if entry.is_empty() {
            return Err(AddressError::Empty(number));
        }
        let address = parse_address(entry)?;
        // Names are compared as DNS compares them.
        let same =
            |a: &PeerAddress| a.port == address.port && a.host.eq_ignore_ascii_case(&address.host);
        if addresses.iter().any(same) {
            return Err(AddressError::Duplicate(entry.to_owned()));
        }
        addresses.push(address);
    }
    if addresses.len() > ADDRESSES_MAX {
        return Err(AddressError::TooMany(addresses.len()));
    }
    Ok(addresses)
}

fn parse_address(entry: &str) -> Result<PeerAddress, AddressError> {
    let malformed = || AddressError::Malformed(entry.to_owned());
    let (host, port) = if let Some(rest) = entry.strip_prefix('[') {
        let (host, rest) = rest.split_once(']').ok_or_else(malformed)?;
        match rest {
            "" => (host, None),
            _ => (host, Some(rest.strip_prefix(':').ok_or_else(malformed)?)),
        }
    } else {
        match entry.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (entry, None),
        }
    };
    if host.is_empty() {
        return Err(AddressError::NoHost(entry.to_owned()));
    }
    if host.len() > HOST_LEN_MAX {
        return Err(AddressError::TooLong(entry.to_owned()));
    }
    let bracketed = entry.starts_with('[');
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if !host
        .chars()
        .all(|c| plain(c) || (bracketed && matches!(c, ':' | '%')))
    {
        return Err(malformed());
    }
    Ok(PeerAddress {
        host: host.to_owned(),
        port: port.map_or(Ok(DEFAULT_PORT), |port| parse_port(entry, port))?,
    })
}

fn parse_port(entry: &str, port: &str) -> Result<u16, AddressError> {
    let digits = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let number = port
        .parse()
        .ok()
        .filter(|&number: &u16| digits && number != 0);
    number.ok_or_else(|| AddressError::Port(entry.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(text: &str) -> String {
        let addresses = parse_addresses(text).expect("a good list");
        addresses
            .iter()
            .map(PeerAddress::to_string)
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn good_lists_are_read_in_order() {
        assert_eq!(listed("a:1,b:2"), "a:1 b:2");
        assert_eq!(listed("  a:1 , 10.0.0.1 "), "a:1 10.0.0.1:5454");
        assert_eq!(listed("[::1]:7,[fe80::1%eth0]"), "::1:7 fe80::1%eth0:5454");
        assert_eq!(listed("a:1,a:2"), "a:1 a:2");
        assert_eq!(listed(" "), "");
    }

    #[test]
    fn a_bad_entry_is_named() {
        for (text, want) in [
            ("a:1,,b:2", "entry 2 of the list is empty"),
            ("a:1,", "entry 2 of the list is empty"),
            (",", "entry 1 of the list is empty"),
            (":5", "\":5\" has no host before the port"),
            ("a:1,b c:2", "\"b c:2\" is not of the form host:port"),
            (
                "a:1;b:2",
                "\"a:1;b:2\" has an invalid port: it must be a number from 1 to 65535",
            ),
            (
                "a:",
                "\"a:\" has an invalid port: it must be a number from 1 to 65535",
            ),
            (
                "a:0",
                "\"a:0\" has an invalid port: it must be a number from 1 to 65535",
            ),
            (
                "a:+1",
                "\"a:+1\" has an invalid port: it must be a number from 1 to 65535",
            ),
            (
                "a:65536",
                "\"a:65536\" has an invalid port: it must be a number from 1 to 65535",
            ),
            ("::1", "\"::1\" has no host before the port"),
            ("[::1", "\"[::1\" is not of the form host:port"),
            ("[::1]5", "\"[::1]5\" is not of the form host:port"),
            ("a/b", "\"a/b\" is not of the form host:port"),
            ("a:1,B:1,A:1", "\"A:1\" is listed twice"),
            ("a,a:5454", "\"a:5454\" is listed twice"),
        ] {
            let got = parse_addresses(text).expect_err(text).to_string();
            assert_eq!(got, want, "{text}");
        }
        let many = (1..=17)
            .map(|port| format!("a:{port}"))
            .collect::<Vec<_>>()
            .join(",");
        assert_eq!(parse_addresses(&many), Err(AddressError::TooMany(17)));
        let long = "a".repeat(HOST_LEN_MAX + 1);
        assert_eq!(parse_addresses(&long), Err(AddressError::TooLong(long)));
    }
}
