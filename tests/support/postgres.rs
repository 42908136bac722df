//! A PostgreSQL server for tests: the one of `DELTASERVE_TEST_POSTGRES` (a URL), or one of its own where PostgreSQL is
//! installed, in a temporary folder. Each test gets a database of its own.

#![allow(
    dead_code,
    clippy::expect_used,
    reason = "a part of several test programs, outside what clippy takes for tests"
)]

use std::{
    fs,
    io::Write as _,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// A URL of a server, or why there is none.
type Found = Result<Server, String>;

struct Server {
    /// Of the server, with a database that is not the tests'.
    url: String,
    /// Holds the server's input open: when this process ends, however it does, the server does, too.
    _watched: Option<Child>,
}

static SERVER: OnceLock<Found> = OnceLock::new();

/// The URL of a new, empty database; or `None`, with the reason printed.
pub(crate) fn new_database() -> Option<String> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let server = match SERVER.get_or_init(start) {
        Ok(server) => server,
        Err(why) => {
            println!("skipped: {why}");
            return None;
        }
    };
    let name = format!("deltaserve_test_{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let made = psql(&server.url, &format!("CREATE DATABASE {name}"));
    assert!(made.as_ref().is_ok(), "a test database could not be made: {made:?}");
    Some(with_database(&server.url, &name))
}

/// Runs a statement on a database, as a tool outside the server would.
pub(crate) fn psql(url: &str, sql: &str) -> Result<String, String> {
    let psql = tool("psql").unwrap_or_else(|| PathBuf::from("psql"));
    let output = Command::new(psql).args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", sql, url]).output();
    let output = output.map_err(|e| format!("psql: {e}"))?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    }
}

/// The same server's other database.
fn with_database(url: &str, name: &str) -> String {
    let (before, query) = url.split_once('?').unwrap_or((url, ""));
    let (scheme, rest) = before.split_once("://").expect("a URL");
    let host = rest.split('/').next().unwrap_or_default();
    let query = if query.is_empty() { String::new() } else { format!("?{query}") };
    format!("{scheme}://{host}/{name}{query}")
}

/// A program of PostgreSQL: Debian keeps the server's beside no path.
fn tool(name: &str) -> Option<PathBuf> {
    let debian = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut folders: Vec<PathBuf> = debian.map(|entry| entry.path().join("bin")).collect();
    folders.sort();
    folders.reverse();
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    folders.into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn start() -> Found {
    if let Ok(url) = std::env::var("DELTASERVE_TEST_POSTGRES") {
        return Ok(Server { url, _watched: None });
    }
    let missing = "PostgreSQL is not installed, and DELTASERVE_TEST_POSTGRES (a URL) is not set";
    let (initdb, postgres) = tool("initdb").zip(tool("postgres")).ok_or(missing)?;
    let root = Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout.starts_with(b"0\n"));
    let folder = std::env::temp_dir().join(format!("dspg-{}", std::process::id()));
    let failed = |what: &str, why: String| format!("PostgreSQL could not be started ({what}): {why}");
    fs::create_dir_all(&folder).map_err(|e| failed("its folder", e.to_string()))?;
    // initdb refuses root: another user must get at the folder
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).map_err(|e| failed("its folder", e.to_string()))?;
    // the server's input is this process's: when that is gone, the server stops and its folder goes
    let script = r#"
set -e
"$1" -D "$3/data" -A trust -U postgres --no-sync -E UTF8 --no-locale >"$3/initdb.log" 2>&1
"$2" -D "$3/data" -k "$3" -c listen_addresses= -c fsync=off -c max_connections=400 </dev/null >"$3/log" 2>&1 &
server=$!
cat >/dev/null
kill -QUIT "$server"; wait "$server" || true
rm -rf "$3"/*
rmdir "$3" 2>/dev/null || true
"#;
    let mut command = match root {
        true => {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", "postgres", "--regid", "postgres", "--clear-groups", "sh"]);
            command
        }
        false => Command::new("sh"),
    };
    command.args(["-c", script, "sh"]).arg(initdb).arg(postgres).arg(&folder);
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().map_err(|e| failed("setpriv or sh", e.to_string()))?;
    let url = format!("postgres://postgres@localhost/postgres?host={}", folder.display());
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(60) {
        if psql(&url, "SELECT 1").is_ok() {
            return Ok(Server { url, _watched: Some(child) });
        }
        if child.try_wait().is_ok_and(|ended| ended.is_some()) {
            return Err(failed("initdb", read(&folder.join("initdb.log"))));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let _ = child.stdin.take().map(|mut input| input.flush());
    Err(failed("no answer", read(&folder.join("log"))))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| e.to_string())
}
