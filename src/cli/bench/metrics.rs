//! The server's metrics: one GET over HTTP/1, the text form that Prometheus reads, and what changed between two readings.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{Request, StatusCode, Uri, header};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_BYTES: usize = 8 << 20;

/// Reads metrics from `http://HOST:PORT/PATH`.
///
/// # Errors
/// An address that is none; a server that does not answer in time, not with 200, with too much, or with what is no metrics.
pub(super) async fn scrape(url: &str) -> anyhow::Result<Scrape> {
    let read = async {
        let text = tokio::time::timeout(TIMEOUT, get(url)).await.context("no answer in time")??;
        Scrape::parse(&text)
    };
    read.await.with_context(|| format!("--metrics {url}"))
}

async fn get(url: &str) -> anyhow::Result<String> {
    let address = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    let uri: Uri = address.parse().context("is no URL")?;
    ensure!(uri.scheme_str() == Some("http"), "only http:// can be read");
    let authority = uri.authority().context("names no host")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let path = uri.path_and_query().map_or("/", |p| p.as_str());
    let path = if path == "/" { "/metrics" } else { path };

    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(80))).await.context("connect")?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header(header::HOST, authority.as_str()).body(Empty::<Bytes>::new())?;
    let ask = async {
        let response = sender.send_request(request).await?;
        let status = response.status();
        if status != StatusCode::OK {
            bail!("the answer is {status}");
        }
        let body = Limited::new(response.into_body(), MAX_BYTES).collect().await;
        let body = body.map_err(|e| anyhow::anyhow!("read the answer: {e}"))?;
        String::from_utf8(body.to_bytes().to_vec()).context("the answer is not UTF-8")
    };
    // the connection moves the bytes, and may end before its answer is read
    tokio::pin!(connection);
    tokio::pin!(ask);
    tokio::select! {
        answer = &mut ask => answer,
        closed = &mut connection => {
            closed.context("the connection")?;
            ask.await
        }
    }
}

/// What kind a metric is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
    /// With `_sum` and `_count`.
    Histogram,
}

/// One reading.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Scrape {
    kinds: BTreeMap<String, Kind>,
    /// By name with labels, as it is written.
    values: BTreeMap<String, f64>,
}

impl Scrape {
    /// Reads the text form, version 0.0.4.
    ///
    /// # Errors
    /// A line that cannot be read, by number.
    pub(super) fn parse(text: &str) -> anyhow::Result<Self> {
        let mut scrape = Self::default();
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            let known = match line.strip_prefix('#') {
                Some(comment) => scrape.comment(comment),
                None if line.is_empty() => Some(()),
                None => scrape.sample(line),
            };
            known.with_context(|| format!("line {} is no metric: {:.80}", i + 1, line))?;
        }
        Ok(scrape)
    }

    fn comment(&mut self, comment: &str) -> Option<()> {
        let mut words = comment.split_whitespace();
        if words.next() == Some("TYPE") {
            let (name, kind) = (words.next()?, words.next()?);
            let kind = match kind {
                "counter" => Kind::Counter,
                "histogram" | "summary" => Kind::Histogram,
                _ => Kind::Gauge,
            };
            self.kinds.insert(name.to_owned(), kind);
        }
        Some(())
    }

    fn sample(&mut self, line: &str) -> Option<()> {
        let name = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == ':'))?;
        let labels = if line[name..].starts_with('{') { labels(&line[name..])? } else { 0 };
        let (key, rest) = line.split_at(name + labels);
        let mut words = rest.split_whitespace();
        let value: f64 = words.next()?.parse().ok()?;
        // a time may follow
        let whole = words.next().is_none_or(|time| time.parse::<i64>().is_ok()) && words.next().is_none();
        if name == 0 || !whole {
            return None;
        }
        self.values.insert(key.to_owned(), value);
        Some(())
    }

    /// Of counters and of sums and counts of histograms, what came since an earlier reading; of gauges, what they are now. Buckets,
    /// and what is no finite number, are left out. A counter that is less than before began anew.
    pub(super) fn since(&self, before: &Self) -> BTreeMap<String, f64> {
        let grown = |key: &str, now: f64| match before.values.get(key) {
            Some(then) if *then <= now => now - then,
            _ => now,
        };
        let mut changes = BTreeMap::new();
        for (key, &now) in &self.values {
            let name = key.split('{').next().unwrap_or_default();
            let kind = |name: &str| self.kinds.get(name).copied();
            let part = ["_sum", "_count", "_bucket"]
                .into_iter()
                .find(|part| name.strip_suffix(part).is_some_and(|whole| kind(whole) == Some(Kind::Histogram)));
            let value = match (part, kind(name)) {
                (Some("_bucket"), _) => continue,
                (Some(_), _) | (None, Some(Kind::Counter)) => grown(key, now),
                // quantiles of a summary
                (None, Some(Kind::Histogram)) => continue,
                (None, Some(Kind::Gauge) | None) => now,
            };
            if value.is_finite() {
                changes.insert(key.clone(), value);
            }
        }
        changes
    }
}

/// Bytes of `{name="value",...}` at the beginning of a text.
fn labels(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (i, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '}' if !quoted => return Some(i + 1),
            _ => {}
        }
    }
    None
}

/// The sum of a metric over its labels.
pub(super) fn total(values: &BTreeMap<String, f64>, name: &str) -> Option<f64> {
    let of = |key: &str| key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('{'));
    let all: Vec<f64> = values.iter().filter(|(key, _)| of(key)).map(|(_, value)| *value).collect();
    (!all.is_empty()).then(|| all.iter().sum())
}

/// The mean of a histogram over its labels, of what was added; none of nothing.
pub(super) fn mean(values: &BTreeMap<String, f64>, name: &str) -> Option<f64> {
    let count = total(values, &format!("{name}_count")).filter(|n| *n > 0.0)?;
    Some(total(values, &format!("{name}_sum"))? / count)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    const TEXT: &str = "# HELP hits_total Hits, by tier.\n# TYPE hits_total counter\nhits_total{tier=\"a\"} 3\n\
        hits_total{tier=\"b}\\\"{\"} 4 1700000000000\n\n# TYPE bytes gauge\nbytes 1.5e3\n# TYPE load_seconds histogram\n\
        load_seconds_bucket{le=\"+Inf\"} 2\nload_seconds_sum 0.5\nload_seconds_count 2\nodd NaN\n";

    #[test]
    fn readings_are_compared_by_the_kind_of_each_metric() {
        let before = Scrape::parse(TEXT).expect("metrics");
        assert_eq!(before.values.get("hits_total{tier=\"b}\\\"{\"}"), Some(&4.0));
        let later = TEXT.replace("} 3\n", "} 13\n").replace("} 4 17", "} 1 17").replace("1.5e3", "1000");
        let later = later.replace("_sum 0.5", "_sum 2.5").replace("_count 2", "_count 6");
        let later = Scrape::parse(&later).expect("metrics").since(&before);
        // 10 more, and one that began anew
        assert_eq!(total(&later, "hits_total"), Some(11.0));
        assert_eq!(total(&later, "bytes"), Some(1000.0));
        assert_eq!(mean(&later, "load_seconds"), Some(0.5));
        assert_eq!((total(&later, "hits"), mean(&later, "bytes")), (None, None));
        assert!(later.keys().all(|key| !key.contains("bucket") && key != "odd"), "{later:?}");
    }

    #[test]
    fn malformed_metrics_are_named_by_line() {
        for bad in ["a", "a{b=\"c\" 1", "a{} x", "{a=\"b\"} 1", "a 1 2 3", "a 1 noon", "<html>", "# TYPE a"] {
            let error = Scrape::parse(&format!("fine 1\n{bad}\n")).expect_err(bad).to_string();
            assert!(error.contains("line 2"), "{bad}: {error}");
        }
        assert_eq!(Scrape::parse("").expect("nothing"), Scrape::default());
    }

    /// Answers one request with these bytes.
    async fn answering(answer: Vec<u8>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a listener");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a client");
            let mut asked = [0; 512];
            let n = stream.read(&mut asked).await.expect("a request");
            assert!(asked[..n].starts_with(b"GET /metrics HTTP/1.1\r\n"));
            // a client that has read enough may be gone
            let _ = stream.write_all(&answer).await;
        });
        address.to_string()
    }

    #[tokio::test]
    async fn metrics_are_read_over_http_and_what_is_none_is_refused() {
        let body = "# TYPE a counter\na 5\n";
        let plain = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        let pieces =
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n13\r\n# TYPE a counter\na \r\n2\r\n5\n\r\n0\r\n\r\n";
        for answer in [plain, pieces.to_owned()] {
            let scrape = scrape(&answering(answer.into_bytes()).await).await.expect("metrics");
            assert_eq!(scrape.values.get("a"), Some(&5.0));
        }
        let mut long = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", MAX_BYTES + 1).into_bytes();
        long.resize(long.len() + MAX_BYTES + 1, b'\n');
        let bad: [(&[u8], &str); 4] = [
            (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "404"),
            (b"SSH-2.0-x\r\n\r\n", "--metrics"),
            (b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>", "line 1"),
            (&long, "read the answer"),
        ];
        for (answer, expected) in bad {
            let error = scrape(&answering(answer.to_vec()).await).await.expect_err(expected);
            assert!(format!("{error:#}").contains(expected), "{error:#}");
        }
        for url in ["https://x/metrics", "http://", "127.0.0.1:1/metrics"] {
            assert!(format!("{:#}", scrape(url).await.expect_err(url)).contains("--metrics"), "{url}");
        }
    }
}
