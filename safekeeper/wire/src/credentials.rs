//! As whom a client of ours connects, and what it demands of the server.

use std::path::PathBuf;

use crate::login::{BindingMode, Login, Password};
use crate::passfile::{PassfileError, find_password};
use crate::tls::{ClientTls, EndPoint};

/// What is the same for all servers of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    pub user: String,
    /// Where its password is, if one is asked for; read anew for each connection. `None`: nowhere.
    pub passfile: Option<PathBuf>,
    pub tls: ClientTls,
    pub binding: BindingMode,
}

impl Credentials {
    /// For servers that trust whoever comes, over connections that are not encrypted.
    pub fn trusted(user: &str) -> Credentials {
        Credentials {
            user: user.to_owned(),
            passfile: None,
            tls: ClientTls::disabled(),
            binding: BindingMode::default(),
        }
    }

    /// What to answer this server when it asks who we are; `end_point` is that of its certificate.
    pub fn login(&self, host: &str, port: u16, end_point: EndPoint) -> Login {
        Login::with(self.password(host, port), end_point, self.binding)
    }

    /// The one for this server, if there is any.
    fn password(&self, host: &str, port: u16) -> Result<Option<Password>, PassfileError> {
        match &self.passfile {
            Some(passfile) => find_password(passfile, host, port, &self.user),
            None => Ok(None),
        }
    }
}
