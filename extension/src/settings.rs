//! The settings, in one table, and the refusal of configurations under which commits would
//! silently not wait for the quorum.
//!
//! Bad values are refused where they are given: `ALTER SYSTEM` fails with the reason. A value that
//! stands in the configuration file when the server starts has been read before this library is
//! loaded, and Postgres would only warn of it and go on with the default, which means without a
//! quorum. So [`check_configuration`] looks at those itself and refuses to start.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::time::Duration;

use pgrx::guc::{GucContext, GucFlags, GucRegistry, GucSetting, PostgresGucEnum};
use pgrx::pg_sys::SyncCommitLevel;
use pgrx::{PgSqlErrorCode, pg_guard, pg_sys};
use safekeeper_protocol::{ClusterIdentity, PeerAddress};

use crate::address::parse_addresses;
use crate::conninfo::{Conninfo, parse_conninfo};
use crate::postgres;

static SAFEKEEPERS: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static CONNINFO: GucSetting<Option<CString>> = GucSetting::<Option<CString>>::new(Some(c""));
static CLUSTER_NAME: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"main"));
static SLOT_NAME: GucSetting<Option<CString>> =
    GucSetting::<Option<CString>>::new(Some(c"walproposer"));
static MEMBER_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(10_000);
static MAX_MEMBER_LAG: GucSetting<i32> = GucSetting::<i32>::new(1024);
static SHUTDOWN_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(30);
static START_TIMEOUT: GucSetting<i32> = GucSetting::<i32>::new(0);
static START_WITHOUT_QUORUM: GucSetting<bool> = GucSetting::<bool>::new(false);
static READ_WAL_BUFFERS: GucSetting<bool> = GucSetting::<bool>::new(true);
static HOLD_CONNECTIONS: GucSetting<bool> = GucSetting::<bool>::new(true);
static HOLD_SUPERUSERS: GucSetting<bool> = GucSetting::<bool>::new(true);
static MIN_SYNCHRONOUS_COMMIT: GucSetting<MinSynchronousCommit> =
    GucSetting::<MinSynchronousCommit>::new(MinSynchronousCommit::RemoteWrite);
static ON_DEPOSED: GucSetting<OnDeposed> = GucSetting::<OnDeposed>::new(OnDeposed::Shutdown);

/// Values of `walproposer.on_deposed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
pub enum OnDeposed {
    #[name = c"shutdown"]
    Shutdown,
    #[name = c"read_only"]
    ReadOnly,
    #[name = c"wait"]
    Wait,
}

/// Values of `walproposer.min_synchronous_commit`, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PostgresGucEnum)]
pub enum MinSynchronousCommit {
    #[name = c"off"]
    Off,
    #[name = c"local"]
    Local,
    #[name = c"remote_write"]
    RemoteWrite,
    #[name = c"on"]
    On,
    #[name = c"remote_apply"]
    RemoteApply,
}

impl MinSynchronousCommit {
    /// The level as Postgres numbers it, and its name.
    pub fn level(self) -> (SyncCommitLevel::Type, &'static CStr) {
        match self {
            Self::Off => (SyncCommitLevel::SYNCHRONOUS_COMMIT_OFF, c"off"),
            Self::Local => (SyncCommitLevel::SYNCHRONOUS_COMMIT_LOCAL_FLUSH, c"local"),
            Self::RemoteWrite => (
                SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_WRITE,
                c"remote_write",
            ),
            Self::On => (SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_FLUSH, c"on"),
            Self::RemoteApply => (
                SyncCommitLevel::SYNCHRONOUS_COMMIT_REMOTE_APPLY,
                c"remote_apply",
            ),
        }
    }
}

/// What the worker, the promoter, the candidate and the last sender start with; changed by a restart only.
pub struct Settings {
    pub safekeepers: Vec<PeerAddress>,
    pub conninfo: Conninfo,
    pub cluster_name: String,
    pub slot_name: CString,
    pub member_timeout: Duration,
}

/// Reads what was checked when it was set.
pub fn settings() -> Settings {
    let checked = "the check hook has refused anything else";
    Settings {
        safekeepers: parse_addresses(&text(&SAFEKEEPERS)).expect(checked),
        conninfo: parse_conninfo(&text(&CONNINFO)).expect(checked),
        cluster_name: text(&CLUSTER_NAME),
        slot_name: SLOT_NAME.get().unwrap_or_default(),
        member_timeout: Duration::from_millis(MEMBER_TIMEOUT.get().unsigned_abs().into()),
    }
}

/// Is there anything to do?
pub fn is_active() -> bool {
    !text(&SAFEKEEPERS).trim().is_empty()
}

/// In bytes. Beyond it, WAL is not kept for a member.
pub fn max_member_lag() -> u64 {
    u64::from(MAX_MEMBER_LAG.get().unsigned_abs()) << 20
}

pub fn shutdown_timeout() -> Duration {
    Duration::from_secs(SHUTDOWN_TIMEOUT.get().unsigned_abs().into())
}

/// `None`: for ever.
pub fn start_timeout() -> Option<Duration> {
    let seconds = START_TIMEOUT.get().unsigned_abs();
    (seconds > 0).then(|| Duration::from_secs(seconds.into()))
}

pub fn start_without_quorum() -> bool {
    START_WITHOUT_QUORUM.get()
}

/// WAL is pushed from the server's buffers, before it is flushed.
pub fn read_wal_buffers() -> bool {
    READ_WAL_BUFFERS.get()
}

pub fn hold_connections() -> bool {
    HOLD_CONNECTIONS.get()
}

/// Superusers on the local socket too.
pub fn hold_superusers() -> bool {
    HOLD_SUPERUSERS.get()
}

pub fn min_synchronous_commit() -> MinSynchronousCommit {
    MIN_SYNCHRONOUS_COMMIT.get()
}

pub fn on_deposed() -> OnDeposed {
    ON_DEPOSED.get()
}

fn text(setting: &GucSetting<Option<CString>>) -> String {
    setting
        .get()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Declares all settings.
pub fn define() {
    define_text(
        c"walproposer.safekeepers",
        c"Safekeepers to which WAL is pushed, as a list of host:port.",
        c"A commit returns once a majority of them has flushed it. Empty: the extension does nothing.",
        &SAFEKEEPERS,
        GucContext::Postmaster,
        Some(check_safekeepers),
    );
    define_text(
        c"walproposer.conninfo",
        c"How to connect to the safekeepers, in libpq's keyword=value form.",
        c"Keywords: user, passfile, connect_timeout, channel_binding, sslmode, sslrootcert, sslcert, sslkey, sslcrl.",
        &CONNINFO,
        GucContext::Sighup,
        Some(check_conninfo),
    );
    define_text(
        c"walproposer.cluster_name",
        c"Name by which consumers choose this cluster at the safekeepers.",
        c"",
        &CLUSTER_NAME,
        GucContext::Postmaster,
        Some(check_cluster_name),
    );
    define_text(
        c"walproposer.slot_name",
        c"Replication slot that keeps WAL until every reachable safekeeper has it.",
        c"",
        &SLOT_NAME,
        GucContext::Postmaster,
        Some(check_slot_name),
    );
    GucRegistry::define_int_guc(
        c"walproposer.member_timeout",
        c"Time after which a safekeeper that does not answer is given up and dialled again.",
        c"",
        &MEMBER_TIMEOUT,
        100,
        3_600_000,
        GucContext::Postmaster,
        GucFlags::UNIT_MS,
    );
    GucRegistry::define_int_guc(
        c"walproposer.max_member_lag",
        c"Amount of WAL that is kept for a safekeeper that lags behind.",
        c"One that lags more is later fed by another safekeeper.",
        &MAX_MEMBER_LAG,
        1,
        i32::MAX,
        GucContext::Sighup,
        GucFlags::UNIT_MB,
    );
    GucRegistry::define_int_guc(
        c"walproposer.shutdown_timeout",
        c"Time for which a shutdown waits for the quorum: for commits in flight, and for the shutdown checkpoint.",
        c"",
        &SHUTDOWN_TIMEOUT,
        0,
        3600,
        GucContext::Sighup,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_int_guc(
        c"walproposer.start_timeout",
        c"Time for which the server's start waits for a quorum of the safekeepers.",
        c"0: for ever.",
        &START_TIMEOUT,
        0,
        86_400,
        GucContext::Postmaster,
        GucFlags::UNIT_S,
    );
    GucRegistry::define_bool_guc(
        c"walproposer.start_without_quorum",
        c"Starts without asking the safekeepers. Commits that only they hold are lost.",
        c"What is written then confers no right to lead; it is for emergencies.",
        &START_WITHOUT_QUORUM,
        GucContext::Postmaster,
        GucFlags::empty(),
    );
    GucRegistry::define_bool_guc(
        c"walproposer.read_wal_buffers",
        c"Pushes WAL out of the server's WAL buffers, while it is being flushed.",
        c"Off: when it is flushed, from files.",
        &READ_WAL_BUFFERS,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_bool_guc(
        c"walproposer.hold_connections",
        c"Holds sessions after a restart until the recovered WAL is on a quorum.",
        c"Without it a session can see a transaction that is lost afterwards.",
        &HOLD_CONNECTIONS,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_bool_guc(
        c"walproposer.hold_superusers",
        c"Holds superusers on the local socket like everybody else.",
        c"Off: a way in for maintenance.",
        &HOLD_SUPERUSERS,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_enum_guc(
        c"walproposer.min_synchronous_commit",
        c"Least synchronous_commit of a transaction that has written WAL.",
        c"A lower one is raised when the transaction commits.",
        &MIN_SYNCHRONOUS_COMMIT,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    GucRegistry::define_enum_guc(
        c"walproposer.on_deposed",
        c"What a primary does when another one was elected.",
        c"It acknowledges no commit any more in any case.",
        &ON_DEPOSED,
        GucContext::Sighup,
        GucFlags::empty(),
    );
    refuse_unknown_settings();
    // SAFETY: the prefix ends with a zero byte; all settings under it have been declared.
    unsafe { pg_sys::MarkGUCPrefixReserved(c"walproposer".as_ptr()) };
}

/// Postgres would only warn of `walproposer.safekeeper`, start, and commit without a quorum.
fn refuse_unknown_settings() {
    if let Some(name) = postgres::placeholder_settings()
        .into_iter()
        .find(|name| name.starts_with("walproposer."))
    {
        postgres::fatal(
            PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR,
            format!("unrecognized configuration parameter \"{name}\""),
            "The settings of walproposer are listed in its README.",
        );
    }
}

fn define_text(
    name: &'static CStr,
    short: &'static CStr,
    long: &'static CStr,
    setting: &'static GucSetting<Option<CString>>,
    context: GucContext,
    check: pg_sys::GucStringCheckHook,
) {
    let none = GucFlags::empty();
    // SAFETY: the check hooks below are guarded against panics.
    unsafe {
        GucRegistry::define_string_guc_with_hooks(
            name, short, long, setting, context, none, check, None, None,
        );
    }
}

/// The reason why a value is refused.
type Checked = Result<(), String>;
type Check = fn(&str) -> Checked;

fn safekeepers_are_valid(value: &str) -> Checked {
    parse_addresses(value)
        .map(drop)
        .map_err(|error| format!("{error}."))
}

fn conninfo_is_valid(value: &str) -> Checked {
    parse_conninfo(value)
        .map(drop)
        .map_err(|error| format!("{error}."))
}

fn cluster_name_is_valid(value: &str) -> Checked {
    if value.is_empty() || value.len() > ClusterIdentity::NAME_LEN_MAX {
        let max = ClusterIdentity::NAME_LEN_MAX;
        return Err(format!("The name must have 1 to {max} bytes."));
    }
    Ok(())
}

fn slot_name_is_valid(value: &str) -> Checked {
    let allowed = |b: u8| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_');
    if value.is_empty()
        || value.len() > ClusterIdentity::NAME_LEN_MAX
        || !value.bytes().all(allowed)
    {
        return Err(
            "Names of slots have 1 to 63 lower case letters, digits and underscores.".into(),
        );
    }
    Ok(())
}

/// # Safety
/// As a check hook: `new_value` points to a C string or null.
unsafe fn check(new_value: *mut *mut c_char, is_valid: Check) -> bool {
    // SAFETY: see above.
    let value = unsafe {
        let value = *new_value;
        if value.is_null() {
            c""
        } else {
            CStr::from_ptr(value)
        }
    };
    let Err(reason) = is_valid(&value.to_string_lossy()) else {
        return true;
    };
    // A zero byte can't come from a C string; if it does, the reason is left out.
    let reason = CString::new(reason).unwrap_or_default();
    // SAFETY: pstrdup copies; Postgres reads the variable right after a hook has said no.
    unsafe { pg_sys::GUC_check_errdetail_string = pg_sys::pstrdup(reason.as_ptr()) };
    false
}

macro_rules! check_hook {
    ($name:ident, $is_valid:ident) => {
        #[pg_guard]
        unsafe extern "C-unwind" fn $name(
            new_value: *mut *mut c_char,
            _extra: *mut *mut c_void,
            _source: pg_sys::GucSource::Type,
        ) -> bool {
            // SAFETY: called by Postgres as a check hook.
            unsafe { check(new_value, $is_valid) }
        }
    };
}

check_hook!(check_safekeepers, safekeepers_are_valid);
check_hook!(check_conninfo, conninfo_is_valid);
check_hook!(check_cluster_name, cluster_name_is_valid);
check_hook!(check_slot_name, slot_name_is_valid);

/// Before [`define`]: refuses to start with values that a check hook would only have warned of.
pub fn check_values_in_file() {
    let checks: [(&CStr, Check); 4] = [
        (c"walproposer.safekeepers", safekeepers_are_valid),
        (c"walproposer.conninfo", conninfo_is_valid),
        (c"walproposer.cluster_name", cluster_name_is_valid),
        (c"walproposer.slot_name", slot_name_is_valid),
    ];
    for (name, is_valid) in checks {
        let Some(value) = postgres::setting(name) else {
            continue;
        };
        let name = name.to_string_lossy();
        if let Err(reason) = is_valid(&value) {
            let text = format!("invalid value for parameter \"{name}\": \"{value}\"");
            postgres::fatal_because(PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR, text, &reason);
        }
    }
}

/// Refuses to start where commits would silently not wait; mends what can be mended.
pub fn check_configuration() {
    require(
        c"wal_level",
        "minimal",
        "Set wal_level to replica or logical.",
    );
    require(
        c"max_wal_senders",
        "0",
        "Set max_wal_senders to at least 2.",
    );
    require(
        c"max_replication_slots",
        "0",
        "Set max_replication_slots to at least 1.",
    );
    let names = postgres::setting(c"synchronous_standby_names").unwrap_or_default();
    if names.trim().is_empty() {
        return postgres::pin_setting(c"synchronous_standby_names", "walproposer");
    }
    if !names_need_walproposer() {
        refuse(
            format!(
                "commits would not wait for the safekeepers with synchronous_standby_names \"{names}\""
            ),
            "Leave synchronous_standby_names empty: standbys that follow the safekeepers need not be named.",
        );
    }
    // A reload must not take away what was just found to be right.
    postgres::pin_setting(c"synchronous_standby_names", &names);
}

fn require(name: &CStr, forbidden: &str, hint: &str) {
    let value = postgres::setting(name).unwrap_or_default();
    if value == forbidden {
        let name = name.to_string_lossy();
        refuse(
            format!("walproposer cannot work with {name} \"{value}\""),
            hint,
        );
    }
}

fn refuse(text: String, hint: &str) -> ! {
    postgres::fatal(PgSqlErrorCode::ERRCODE_CONFIG_FILE_ERROR, text, hint)
}

/// Does every commit wait for the standby of our name, and for nothing else? Another name beside it
/// could release a commit in our place: Postgres counts connections, and two of one name count as
/// two.
fn names_need_walproposer() -> bool {
    // SAFETY: the parsed list of the current value, null if there is none; its first name
    // stands at `member_names`, with a zero byte at its end.
    unsafe {
        let config = pg_sys::SyncRepConfig;
        if config.is_null() {
            return false;
        }
        let (required, listed): (c_int, c_int) = ((*config).num_sync, (*config).nmembers);
        let name = CStr::from_ptr((&raw const (*config).member_names).cast::<c_char>());
        let ours = name.to_bytes().eq_ignore_ascii_case(b"walproposer");
        listed == 1 && required == 1 && ours
    }
}
