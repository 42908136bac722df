//! The log on a disk: what is durable, what rotation and damage do to it, and what is refused.

use serde_json::Value;

use super::*;

fn event(object: &str) -> Event {
    Event::now(Phase::End, "Upload", Note { object: object.into(), ..Note::default() })
}

fn objects(path: &std::path::Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    let object = |line: &str| match serde_json::from_str::<Value>(line) {
        Ok(event) => event["object"].as_str().unwrap_or_default().to_owned(),
        Err(_) => format!("torn: {line}"),
    };
    text.lines().map(object).collect()
}

fn open(path: &std::path::Path, required: bool) -> AuditLog {
    AuditLog::open(&AuditConfig { file: Some(path.to_owned()), required }).unwrap()
}

#[tokio::test]
async fn events_are_appended_in_order_and_the_file_is_nobody_elses() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.jsonl");
    for part in ["first", "second"] {
        let log = open(&path, part == "first");
        assert!(log.is_on() && log.is_required() == (part == "first"));
        for i in 0..50 {
            log.record(&event(&format!("{part}{i}"))).await.unwrap();
        }
        if part == "first" {
            assert_eq!(objects(&path).len(), 50, "what was waited for is there");
        }
        log.close().await;
        assert!(log.record(&event("late")).await.is_ok() != (part == "first"), "it has ended");
    }
    let wanted: Vec<String> =
        ["first", "second"].iter().flat_map(|p| (0..50).map(move |i| format!("{p}{i}"))).collect();
    assert_eq!(objects(&path), wanted);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_file_that_was_moved_away_is_made_anew_and_a_torn_line_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (path, old) = (dir.path().join("audit.jsonl"), dir.path().join("audit.1"));
    std::fs::write(&path, "{\"object\": \"tor").unwrap();
    let log = open(&path, true);
    log.record(&event("a")).await.unwrap();
    assert_eq!(objects(&path), ["torn: {\"object\": \"tor", "a"]);
    std::fs::rename(&path, &old).unwrap();
    log.record(&event("b")).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    log.record(&event("c")).await.unwrap();
    assert_eq!((objects(&old).len(), objects(&path)), (2, vec!["c".to_owned()]));
    log.close().await;
}

#[tokio::test]
async fn what_cannot_be_written_is_refused_where_it_must_be_and_goes_on_when_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("folder/audit.jsonl");
    assert!(AuditLog::open(&AuditConfig { file: Some(path.clone()), required: false }).is_err(), "said at the start");
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    let (strict, lax) = (open(&path, true), open(&path, false));
    std::fs::remove_dir_all(dir.path().join("folder")).unwrap();
    assert_eq!(strict.record(&event("a")).await, Err(AuditError));
    assert_eq!(lax.record(&event("b")).await, Ok(()));
    std::fs::create_dir(dir.path().join("folder")).unwrap();
    assert_eq!(strict.record(&event("c")).await, Ok(()));
    strict.close().await;
    lax.close().await;
    assert!(objects(&path).contains(&"c".to_owned()) && !objects(&path).contains(&"a".to_owned()));
}

#[tokio::test]
async fn without_a_file_nothing_is_recorded_and_nothing_refused() {
    let log = AuditLog::open(&AuditConfig { file: None, required: true }).unwrap();
    assert!(!log.is_on() && !log.is_required());
    assert_eq!(log.record(&event("a")).await, Ok(()));
    log.close().await;
}

#[tokio::test]
async fn parts_of_a_call_say_what_it_changes_also_from_tasks_of_their_own() {
    let kept = Arc::new(Mutex::new(Note::default()));
    note(|n| n.object = "nobody hears this".into());
    noting(Arc::clone(&kept), async {
        note(|n| n.object = "delta".into());
        tokio::spawn(carried(async { note(|n| n.detail = Some("pinned".into())) })).await.unwrap();
        tokio::spawn(async { note(|n| n.object = "nor this".into()) }).await.unwrap();
    })
    .await;
    let kept = kept.lock();
    assert_eq!((kept.object.as_str(), kept.detail.as_deref()), ("delta", Some("pinned")));
}
