//! The subcommands of `safekeeper`.

use std::fmt::Display;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use safekeeper::config::{Config, DEFAULT_HTTP, DEFAULT_LISTEN};
use safekeeper::fetch_wal::FetchRequest;
use safekeeper::identity::{DataDir, random_incarnation};
use safekeeper::logging::{self, LogFormat};
use safekeeper::server::Server;
use safekeeper::status::{Status, members_table, status_table};
use safekeeper::tail::{Form, TailRequest};
use safekeeper::users::{Role, User, Users};
use safekeeper_client::follower::FollowerConfig;
use safekeeper_protocol::{Lsn, MemberId, Tli};
use safekeeper_wire::credentials::Credentials;
use safekeeper_wire::login::BindingMode;
use safekeeper_wire::passfile::default_passfile;
use safekeeper_wire::scram::Verifier;
use safekeeper_wire::tls::{ClientTls, SslMode};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// How long another safekeeper may take to tell its status.
const STATUS_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest password that is read, with what stands behind it, in bytes.
const PASSWORD_LEN_MAX: u64 = 64 * 1024;

/// For each step of finding somebody to follow.
const TAIL_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest status that is read, in bytes.
const STATUS_LEN_MAX: u64 = 16 * 1024 * 1024;

/// A WAL-only member of a PostgreSQL commit quorum.
#[derive(Debug, Parser)]
#[command(name = "safekeeper", version)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a data directory.
    Init {
        #[arg(long)]
        data_dir: PathBuf,
        /// Number of this safekeeper, different from those of all others; not 0.
        #[arg(long)]
        id: u64,
    },
    /// Run the daemon until SIGTERM or SIGINT.
    Run(RunArguments),
    /// Show what running safekeepers hold.
    Status(StatusArguments),
    /// Show who the members of each cluster are.
    Members(StatusArguments),
    /// Print what is in a data directory. Changes nothing.
    Dump {
        #[arg(long)]
        data_dir: PathBuf,
    },
    /// Bring a WAL segment or history file from the safekeepers: a restore_command.
    FetchWal(FetchArguments),
    /// Print a cluster's log, from safekeepers or a primary, a line a record; all of it is checked.
    Tail(TailArguments),
    /// Say who may log in. A running daemon hears of it by SIGHUP.
    #[command(subcommand)]
    User(UserCommand),
    /// Check everything in a data directory. Changes nothing; the daemon may be running.
    Verify {
        #[arg(long)]
        data_dir: PathBuf,
    },
}

#[derive(Debug, Args)]
struct RunArguments {
    #[arg(long)]
    data_dir: PathBuf,
    /// TOML file with the settings below, named with underscores; the command line wins.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Where proposers and consumers connect [default: 127.0.0.1:5454]
    #[arg(long, value_name = "HOST:PORT")]
    listen: Option<String>,
    /// Where metrics and status are served [default: 127.0.0.1:7676]
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    /// Listen beyond loopback though nobody is authenticated.
    #[arg(long)]
    trust_network: bool,
    /// Connections at a time [default: 100]
    #[arg(long, value_name = "N")]
    max_connections: Option<i64>,
    /// WAL kept below commit_lsn that nobody connected needs [default: 1GB]
    #[arg(long, value_name = "SIZE")]
    wal_keep_size: Option<String>,
    /// WAL kept below commit_lsn whoever needs it; 0 has no bound [default: 64GB]
    #[arg(long, value_name = "SIZE")]
    max_wal_keep: Option<String>,
    /// With less on the disk the oldest WAL goes, whoever needs it; 0: never [default: 256MB]
    #[arg(long, value_name = "SIZE")]
    min_free_space: Option<String>,
    /// Replication slots of one cluster [default: 10]
    #[arg(long, value_name = "N")]
    max_replication_slots: Option<i64>,
    /// A consumer silent for longer is dropped; 0 waits for ever [default: 60s]
    #[arg(long, value_name = "TIME")]
    wal_sender_timeout: Option<String>,
    /// [default: text]
    #[arg(long)]
    log_format: Option<LogFormat>,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
}

#[derive(Debug, Args)]
struct StatusArguments {
    /// HTTP addresses of safekeepers.
    #[arg(value_name = "HOST:PORT", default_value = DEFAULT_HTTP)]
    addresses: Vec<String>,
    #[arg(long, value_enum, default_value_t = OutputFormat::Table)]
    output: OutputFormat,
}

#[derive(Debug, Args)]
#[command(after_help = "\
restore_command = 'safekeeper fetch-wal %f %p'

Exit codes: 0 done; 1 not there, or not to be had now; 2 wrong usage; 128 stops a recovery that is no \
standby's and must not take \"I don't know\" for \"there is no more\".")]
struct FetchArguments {
    /// Name of the file, %f.
    file: String,
    /// Where it is put, %p. The data directory above it names the safekeepers (walproposer.toml).
    path: PathBuf,
    /// WAL addresses of safekeepers, instead of those that the data directory names.
    #[arg(long, value_name = "HOST:PORT[,HOST:PORT...]")]
    from: Vec<String>,
    /// The primary's walproposer.cluster_name.
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    #[arg(long, value_name = "NAME")]
    user: Option<String>,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Add a user. The password is the first line of a file, or of standard input.
    Add {
        name: String,
        #[arg(long)]
        data_dir: PathBuf,
        /// What it may do: proposer, push WAL as a primary does; replication, read it as a standby does;
        /// monitor, look; admin, all but push. May be given several times.
        #[arg(long, required = true, value_enum)]
        role: Vec<Role>,
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// It comes with a certificate, by a rule with method "cert".
        #[arg(long, conflicts_with = "password_file")]
        no_password: bool,
    },
    /// Print users and roles.
    List {
        #[arg(long)]
        data_dir: PathBuf,
    },
    Remove {
        name: String,
        #[arg(long)]
        data_dir: PathBuf,
    },
}

#[derive(Debug, Args)]
#[command(after_help = "\
Lines are those of pg_waldump; of what a resource manager says of its own records there is only the name, \
and of rarer ones a number.

Exit codes: 0 done; 1 failed, or damaged WAL; 2 wrong usage; 3 nobody could be reached.")]
struct TailArguments {
    /// Safekeepers or primaries, asked in turn: the next one goes on when one is lost.
    #[arg(long, value_name = "HOST:PORT[,HOST:PORT...]", value_delimiter = ',', default_value = DEFAULT_LISTEN)]
    from: Vec<String>,
    /// Begin with the first record at or behind this; without it where the log ends now.
    #[arg(long, value_name = "LSN", required_unless_present = "follow")]
    start: Option<Lsn>,
    /// End before this.
    #[arg(long, value_name = "LSN")]
    end: Option<Lsn>,
    /// Print so many records.
    #[arg(long, value_name = "N")]
    limit: Option<u64>,
    /// Wait for more at the end of the log, and go on when a server is lost.
    #[arg(long)]
    follow: bool,
    /// Begin on this timeline, not the one that the log was on at the start.
    #[arg(long, value_name = "N")]
    timeline: Option<u32>,
    /// Counts and bytes of each resource manager instead of records.
    #[arg(long, conflicts_with = "output")]
    summary: bool,
    /// The primary's walproposer.cluster_name, where a safekeeper serves several clusters.
    #[arg(long, value_name = "NAME")]
    cluster: Option<String>,
    #[arg(long, value_name = "NAME", default_value = "safekeeper")]
    user: String,
    /// Where its password is, as libpq's [default: PGPASSFILE, or ~/.pgpass]
    #[arg(long, value_name = "FILE")]
    passfile: Option<PathBuf>,
    /// disable, prefer, require, verify-ca or verify-full, as libpq's.
    #[arg(long, env = "PGSSLMODE", value_name = "MODE", default_value = "prefer")]
    sslmode: SslMode,
    /// Certificates of the authorities that are trusted.
    #[arg(long, env = "PGSSLROOTCERT", value_name = "FILE")]
    sslrootcert: Option<PathBuf>,
    /// Certificate that is shown to a server that asks for one.
    #[arg(long, env = "PGSSLCERT", value_name = "FILE", requires = "sslkey")]
    sslcert: Option<PathBuf>,
    #[arg(long, env = "PGSSLKEY", value_name = "FILE", requires = "sslcert")]
    sslkey: Option<PathBuf>,
    /// Certificates that those authorities have revoked.
    #[arg(long, env = "PGSSLCRL", value_name = "FILE", requires = "sslrootcert")]
    sslcrl: Option<PathBuf>,
    /// disable, prefer or require, as libpq's.
    #[arg(
        long,
        env = "PGCHANNELBINDING",
        value_name = "MODE",
        default_value = "prefer"
    )]
    channel_binding: BindingMode,
    #[arg(long, value_enum, default_value_t = TailFormat::Text)]
    output: TailFormat,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum TailFormat {
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum OutputFormat {
    Table,
    Json,
}

/// Why the command failed, and the exit code that says so.
#[derive(Debug)]
pub struct Failure {
    pub code: u8,
    pub message: String,
}

impl Failure {
    fn failed(error: impl Display) -> Failure {
        Failure {
            code: 1,
            message: error.to_string(),
        }
    }

    fn usage(error: impl Display) -> Failure {
        Failure {
            code: 2,
            message: error.to_string(),
        }
    }
}

/// A command line that makes no sense, or asks for help.
pub fn refuse(error: &clap::Error) -> ExitCode {
    // Whoever does not listen misses it.
    let _ = error.print();
    let is_fetch_wal = std::env::args_os()
        .nth(1)
        .is_some_and(|verb| verb == "fetch-wal");
    match u8::try_from(error.exit_code()) {
        Ok(2) if is_fetch_wal => ExitCode::from(safekeeper::fetch_wal::exit_code_for_usage()),
        Ok(code) => ExitCode::from(code),
        Err(_) => ExitCode::FAILURE,
    }
}

pub fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command {
        Command::Init { data_dir, id } => init(&data_dir, id),
        Command::Run(arguments) => run_daemon(&arguments),
        Command::Status(arguments) => show(&arguments, status_table),
        Command::Members(arguments) => show(&arguments, members_table),
        Command::Dump { data_dir } => {
            safekeeper::dump::dump(&data_dir, &mut std::io::stdout().lock())
                .map_err(Failure::failed)
        }
        Command::FetchWal(arguments) => fetch_wal(&arguments),
        Command::Tail(arguments) => tail(arguments),
        Command::User(command) => user(command),
        Command::Verify { data_dir } => verify(&data_dir),
    }
}

fn user(command: UserCommand) -> Result<(), Failure> {
    match command {
        UserCommand::Add {
            name,
            data_dir,
            role,
            password_file,
            no_password,
        } => {
            let mut users = users_of(&data_dir)?;
            let verifier = match no_password {
                true => None,
                false => {
                    let password = read_password(password_file.as_deref())?;
                    Some(Verifier::of_password(&password))
                }
            };
            let user = User {
                name,
                roles: role,
                verifier,
            };
            users.add(user).map_err(Failure::failed)?;
            users.store(&data_dir).map_err(Failure::failed)
        }
        UserCommand::List { data_dir } => {
            let users = users_of(&data_dir)?;
            let line = |user: &User| {
                let roles: Vec<_> = user.roles.iter().map(Role::to_string).collect();
                format!("{}  {}\n", user.name, roles.join(","))
            };
            print(&users.list().iter().map(line).collect::<String>())
        }
        UserCommand::Remove { name, data_dir } => {
            let mut users = users_of(&data_dir)?;
            users.remove(&name).map_err(Failure::failed)?;
            users.store(&data_dir).map_err(Failure::failed)
        }
    }
}

fn users_of(data_dir: &Path) -> Result<Users, Failure> {
    safekeeper::identity::read_identity(data_dir).map_err(Failure::failed)?;
    Users::load(data_dir).map_err(Failure::failed)
}

fn read_password(file: Option<&Path>) -> Result<String, Failure> {
    let (read, whence) = match file {
        Some(path) => (std::fs::read_to_string(path), path.display().to_string()),
        None => (
            std::io::read_to_string(std::io::stdin().lock().take(PASSWORD_LEN_MAX)),
            "standard input".to_owned(),
        ),
    };
    let text = read.map_err(|error| {
        Failure::failed(format!("could not read a password from {whence}: {error}"))
    })?;
    match text.lines().next() {
        Some(password) if !password.is_empty() => Ok(password.to_owned()),
        _ => Err(Failure::usage(format!("no password in {whence}"))),
    }
}

fn tail(arguments: TailArguments) -> Result<(), Failure> {
    let form = match (arguments.summary, arguments.output) {
        (true, _) => Form::Summary,
        (false, TailFormat::Text) => Form::Lines,
        (false, TailFormat::Json) => Form::Json,
    };
    let request = TailRequest {
        follower: FollowerConfig {
            addresses: arguments.from,
            credentials: Credentials {
                user: arguments.user,
                passfile: arguments.passfile.or_else(default_passfile),
                tls: ClientTls {
                    mode: arguments.sslmode,
                    root_cert: arguments.sslrootcert,
                    cert: arguments.sslcert,
                    key: arguments.sslkey,
                    crl: arguments.sslcrl,
                },
                binding: arguments.channel_binding,
            },
            application_name: "safekeeper tail".to_owned(),
            cluster: arguments.cluster,
            timeout: TAIL_TIMEOUT,
            start_lsn: arguments.start,
            tli: arguments.timeline.map(Tli),
        },
        follows: arguments.follow,
        end_lsn: arguments.end,
        limit: arguments.limit,
        form,
    };
    let complain = |text: &str| eprintln!("safekeeper: {text}");
    let tailed = safekeeper::tail::tail(&request, &mut std::io::stdout().lock(), complain);
    tailed.map_err(|error| Failure {
        code: if error.is_not_running() { 3 } else { 1 },
        message: error.to_string(),
    })
}

fn fetch_wal(arguments: &FetchArguments) -> Result<(), Failure> {
    let request = FetchRequest {
        file: &arguments.file,
        from: &arguments.from,
        cluster: arguments.cluster.as_deref(),
        user: arguments.user.as_deref(),
    };
    safekeeper::fetch_wal::fetch_wal(&request, &arguments.path).map_err(|error| Failure {
        code: error.exit_code(&arguments.path),
        message: error.message().to_owned(),
    })
}

fn init(data_dir: &Path, id: u64) -> Result<(), Failure> {
    let incarnation = random_incarnation().map_err(Failure::failed)?;
    DataDir::init(data_dir, MemberId(id), incarnation).map_err(Failure::failed)?;
    print(&format!(
        "made {} for safekeeper {id}, incarnation {incarnation}\n",
        data_dir.display()
    ))
}

fn config_of(arguments: &RunArguments) -> Result<Config, Failure> {
    let mut config = match &arguments.config {
        Some(path) => Config::from_file(path).map_err(Failure::usage)?,
        None => Config::default(),
    };
    let text = |value: &Option<String>| value.clone().map(toml::Value::from);
    let log_format = arguments.log_format.map(|format| match format {
        LogFormat::Text => "text".into(),
        LogFormat::Json => "json".into(),
    });
    for (name, value) in [
        ("listen", text(&arguments.listen)),
        ("http", text(&arguments.http)),
        (
            "trust_network",
            arguments.trust_network.then(|| true.into()),
        ),
        (
            "max_connections",
            arguments.max_connections.map(toml::Value::from),
        ),
        ("wal_keep_size", text(&arguments.wal_keep_size)),
        ("max_wal_keep", text(&arguments.max_wal_keep)),
        ("min_free_space", text(&arguments.min_free_space)),
        (
            "max_replication_slots",
            arguments.max_replication_slots.map(toml::Value::from),
        ),
        ("wal_sender_timeout", text(&arguments.wal_sender_timeout)),
        ("log_format", log_format),
        ("log_level", text(&arguments.log_level)),
    ] {
        if let Some(value) = value {
            config.set(name, value).map_err(Failure::usage)?;
        }
    }
    config.addresses().map_err(Failure::usage)?;
    Ok(config)
}

fn run_daemon(arguments: &RunArguments) -> Result<(), Failure> {
    let config = config_of(arguments)?;
    logging::start(config.log_format, config.log_level);
    abort_on_panic();
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(Failure::failed)?;
    log::info!("starting version={} {config:?}", env!("CARGO_PKG_VERSION"));
    let data_dir = DataDir::open(&arguments.data_dir).map_err(Failure::failed)?;
    let server = Server::start(data_dir, config).map_err(Failure::failed)?;
    for signal in signals.forever() {
        let name = match signal {
            SIGHUP => {
                let reloaded = config_of(arguments)
                    .and_then(|config| server.reload(&config).map_err(Failure::failed));
                if let Err(Failure { message, .. }) = reloaded {
                    log::warn!("access control stays as it was: {message}");
                }
                continue;
            }
            SIGTERM => "SIGTERM",
            _ => "SIGINT",
        };
        log::info!("received {name}");
        break;
    }
    server.stop();
    Ok(())
}

/// An assert that kills one thread and leaves the others answering is worse than none.
fn abort_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let backtrace = std::backtrace::Backtrace::force_capture();
        log::error!(
            "panic, the process ends: {panic} thread={}\n{backtrace}",
            thread.name().unwrap_or("?")
        );
        std::process::abort();
    }));
}

fn show(
    arguments: &StatusArguments,
    table: impl Fn(&[(String, Status)]) -> String,
) -> Result<(), Failure> {
    let mut statuses = Vec::new();
    let mut failure = None;
    for address in &arguments.addresses {
        match fetch(address) {
            Ok(status) => statuses.push((address.clone(), status)),
            Err(one) => {
                eprintln!("safekeeper: {}", one.message);
                failure = Some(one);
            }
        }
    }
    match arguments.output {
        OutputFormat::Table if statuses.is_empty() => {}
        OutputFormat::Table => print(&table(&statuses))?,
        OutputFormat::Json => {
            let list: Vec<_> = statuses
                .iter()
                .map(|(address, status)| serde_json::json!({"address": address, "status": status}))
                .collect();
            let json = serde_json::to_string_pretty(&list).map_err(Failure::failed)?;
            print(&(json + "\n"))?;
        }
    }
    match failure {
        None => Ok(()),
        Some(one) => Err(Failure {
            code: one.code,
            message: format!(
                "{} of {} safekeepers answered",
                statuses.len(),
                arguments.addresses.len()
            ),
        }),
    }
}

fn fetch(address: &str) -> Result<Status, Failure> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(STATUS_TIMEOUT))
        .proxy(None)
        .build()
        .into();
    let failure = |error: ureq::Error| Failure {
        code: match &error {
            ureq::Error::ConnectionFailed | ureq::Error::Io(_) => 3,
            _ => 1,
        },
        message: format!("no status from {address}: {error}"),
    };
    let mut response = agent
        .get(format!("http://{address}/v1/status"))
        .call()
        .map_err(failure)?;
    let body = response.body_mut().with_config().limit(STATUS_LEN_MAX);
    body.read_json().map_err(failure)
}

fn verify(data_dir: &Path) -> Result<(), Failure> {
    let report = safekeeper::verify::verify(data_dir).map_err(Failure::failed)?;
    print(&report.to_string())?;
    if report.is_sound() {
        Ok(())
    } else {
        Err(Failure::failed("the data directory is damaged"))
    }
}

/// To stdout; a reader that has seen enough is no failure.
fn print(text: &str) -> Result<(), Failure> {
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::failed(error)),
        _ => Ok(()),
    }
}
