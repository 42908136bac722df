//! Dates of files, in UTC: `2027-01-31` or `2027-01-31T12:00:00Z` to seconds since 1970 and back.

use std::time::{SystemTime, UNIX_EPOCH};

const DAY: u64 = 86_400;
/// Days of a common year ahead of each month.
const AHEAD: [u64; 12] = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334];

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Seconds since 1970 of a date (its beginning) or a time.
pub(super) fn parse(text: &str) -> Option<u64> {
    let (date, time) = match text.split_once('T') {
        Some((date, time)) => (date, time.strip_suffix('Z')?),
        None => (text, "00:00:00"),
    };
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let [hour, minute, second] = numbers(time, ':', [2, 2, 2])?;
    let in_range = year >= 1970 && (1..=12).contains(&month) && hour < 24 && minute < 60 && second < 60;
    if !in_range || !(1..=month_days(year, month)).contains(&day) {
        return None;
    }
    let days = year_start(year) + month_start(year, month) + day - 1;
    Some(days * DAY + hour * 3600 + minute * 60 + second)
}

/// The time as [`parse`] reads it.
pub(super) fn format(seconds: u64) -> String {
    let (days, rest) = (seconds / DAY, seconds % DAY);
    // no year is longer than 366 days, so this is the year or one ahead of it
    let mut year = 1970 + days / 366;
    while year_start(year + 1) <= days {
        year += 1;
    }
    let day = days - year_start(year);
    let month = (1..=12).rev().find(|&month| month_start(year, month) <= day).unwrap_or(1);
    let day = day - month_start(year, month) + 1;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

/// Three numbers of these many digits.
fn numbers(text: &str, separator: char, digits: [usize; 3]) -> Option<[u64; 3]> {
    let mut parts = text.split(separator);
    let mut out = [0; 3];
    for (place, digits) in out.iter_mut().zip(digits) {
        let part = parts.next().filter(|p| p.len() == digits && p.bytes().all(|b| b.is_ascii_digit()))?;
        *place = part.parse().ok()?;
    }
    parts.next().is_none().then_some(out)
}

fn is_leap(year: u64) -> bool {
    year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
}

/// Days from 1970 to the year's first.
fn year_start(year: u64) -> u64 {
    let leaps = |year: u64| (year - 1) / 4 - (year - 1) / 100 + (year - 1) / 400;
    365 * (year - 1970) + leaps(year) - leaps(1970)
}

/// Days of the year ahead of a month.
fn month_start(year: u64, month: u64) -> u64 {
    AHEAD[(month - 1) as usize] + u64::from(month > 2 && is_leap(year))
}

fn month_days(year: u64, month: u64) -> u64 {
    let end = if month == 12 { 365 + u64::from(is_leap(year)) } else { month_start(year, month + 1) };
    end - month_start(year, month)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-02-29T12:34:56Z", 951_827_696),
            ("2001-09-09T01:46:40Z", 1_000_000_000),
            ("2024-12-31T23:59:59Z", 1_735_689_599),
            ("2100-03-01T00:00:00Z", 4_107_542_400),
        ] {
            assert_eq!(parse(text), Some(seconds), "{text}");
            assert_eq!(format(seconds), text);
        }
        assert_eq!(parse("2001-09-09"), Some(999_993_600));
        for bad in ["", "2023-02-29", "2100-02-29", "2024-13-01", "2024-1-1", "2024-01-01T24:00:00Z", "1969-12-31"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
        for bad in ["2024-01-01T00:00:00", "2024-01-01T00:00:00+01:00", "2024-01-01 00:00:00Z", "2024-01-01-01", "-"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn every_day_of_four_centuries_reads_back() {
        for day in 0..146_097 {
            let seconds = day * DAY + 1;
            assert_eq!(parse(&format(seconds)), Some(seconds), "day {day}");
        }
    }
}
