//! One event of the audit log, and its form: a JSON object on one line.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

/// When a call is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// It is about to be done.
    Begin,
    /// It has ended.
    End,
}

/// A version of a delta.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Version {
    /// Its number under its name.
    pub number: u64,
    /// Its digest.
    pub id: String,
}

/// What a call changes, as far as its parts have said.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Note {
    /// Whose it is.
    pub tenant: String,
    /// What it is called: a delta's name or reference, an id of a dataset or job, a tenant.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub object: String,
    /// What was current when the call came.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Version>,
    /// What the call has made current, or made.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Version>,
    /// Digest of a dataset.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The job that published, or whose checkpoint was published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// More, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// An event.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Event {
    /// RFC 3339, UTC, with milliseconds.
    pub time: String,
    /// Whether it is about to be done or was.
    pub phase: Phase,
    /// The method that was called, or `JobPublish`.
    pub action: String,
    /// Who called: the credential's id; `None` = not known.
    pub caller: Option<String>,
    /// Where from.
    pub peer: Option<String>,
    /// What changed.
    #[serde(flatten)]
    pub note: Note,
    /// How it ended: a status code in gRPC's words; empty at the beginning.
    #[serde(skip_serializing_if = "str::is_empty")]
    pub code: &'static str,
    /// The stable reason of a refusal.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

impl Event {
    /// An event of now.
    pub fn now(phase: Phase, action: &str, note: Note) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time = rfc3339(u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
        let (caller, peer, reason) = (None, None, String::new());
        Self { time, phase, action: action.to_owned(), caller, peer, note, code: "", reason }
    }

    /// Its line, with the end of it.
    pub(super) fn line(&self) -> String {
        // strings and numbers only: it cannot fail, and if it did, that is what is recorded
        let mut line = serde_json::to_string(self).unwrap_or_else(|e| format!("{{\"error\":{:?}}}", e.to_string()));
        line.push('\n');
        line
    }
}

/// Unix milliseconds as `2026-11-30T21:36:32.005Z`.
fn rfc3339(ms: u64) -> String {
    let (days, of_day) = (ms / 86_400_000, ms % 86_400_000);
    let (year, month, day) = civil(days);
    let (h, m, s) = (of_day / 3_600_000, of_day / 60_000 % 60, of_day / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z", of_day % 1000)
}

/// The date of a day since 1970-01-01. Years are counted from March, so that a leap day is the last of its year; 400 of
/// them have 146,097 days.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days.saturating_add(719_468); // since 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year + year / 4 - year / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599_000, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(rfc3339(ms), text);
        }
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        let note = Note {
            tenant: "acme".into(),
            object: "a\n\"b\"".into(),
            after: Some(Version { number: 3, id: "ab".into() }),
            ..Note::default()
        };
        let event = Event { code: "OK", ..Event::now(Phase::End, "Upload", note) };
        let line = event.line();
        assert!(line.ends_with('\n') && line.matches('\n').count() == 1, "{line}");
        let read: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!((read["tenant"].as_str(), read["object"].as_str()), (Some("acme"), Some("a\n\"b\"")));
        assert_eq!((read["phase"].as_str(), read["after"]["number"].as_u64()), (Some("end"), Some(3)));
        assert!(read.get("before").is_none() && read["caller"].is_null());
    }
}
