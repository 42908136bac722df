//! Connections that break HTTP/2's manners: floods of resets, headers, pings and settings, headers without an end, windows
//! of nothing. Frames are written by hand, so that no client library keeps them from the server. Whatever becomes of the
//! connection, others are served.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

use crate::support::*;

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// `SETTINGS_INITIAL_WINDOW_SIZE`.
const WINDOW: u16 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = (payload.len() as u32).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header as HPACK writes it without a table: a name and a value of less than 127 bytes each.
fn header(name: &str, value: &str) -> Vec<u8> {
    assert!(name.len() < 127 && value.len() < 127);
    [&[0, name.len() as u8][..], name.as_bytes(), &[value.len() as u8], value.as_bytes()].concat()
}

/// The headers of a call.
fn call(method: &str) -> Vec<u8> {
    let path = format!("/deltaserve.v1.InferenceService/{method}");
    let all = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", &path),
        (":authority", "server"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    all.iter().flat_map(|(name, value)| header(name, value)).collect()
}

/// A client's end of a connection. What the server says is read beside it, to the connection's end.
struct Raw {
    write: OwnedWriteHalf,
    read: JoinHandle<Vec<(u8, u32, Vec<u8>)>>,
}

impl Raw {
    async fn connect(to: SocketAddr, settings: &[(u16, u32)]) -> Self {
        let (read, mut write) = TcpStream::connect(to).await.expect("a connection").into_split();
        let settings: Vec<u8> =
            settings.iter().flat_map(|(id, n)| [&id.to_be_bytes()[..], &n.to_be_bytes()].concat()).collect();
        write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("it listens");
        write.write_all(&frame(SETTINGS, 0, 0, &settings)).await.expect("it listens");
        Self { write, read: tokio::spawn(frames(read)) }
    }

    /// Writes until all is written, or the server takes no more. Whether it took all.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        tokio::time::timeout(Duration::from_secs(20), self.write.write_all(bytes)).await.is_ok_and(|w| w.is_ok())
    }

    /// All frames of the server, once it has closed the connection.
    async fn until_closed(self) -> Vec<(u8, u32, Vec<u8>)> {
        let Self { write, read } = self;
        let frames = timely("the server closes the connection", read).await.expect("no panic");
        drop(write);
        frames
    }
}

/// Kind, stream and payload of every frame to the end of a connection.
async fn frames(mut read: OwnedReadHalf) -> Vec<(u8, u32, Vec<u8>)> {
    let mut out = Vec::new();
    loop {
        let mut head = [0; 9];
        if read.read_exact(&mut head).await.is_err() {
            return out;
        }
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let mut payload = vec![0; length];
        if read.read_exact(&mut payload).await.is_err() {
            return out;
        }
        out.push((head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), payload));
    }
}

/// A server that answers as before, to one who asks now.
async fn still_serves(running: &Running) {
    let said = running.client.generate(ask("", "hello", 4)).await.expect("it still answers");
    assert_eq!(said.ids.len(), 4);
    eventually("nothing is left running", async || running.client.running().await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_that_are_opened_and_reset_by_thousands_cost_their_connection_only() {
    let world = World::new();
    let running = world.start().await;
    let mut raw = Raw::connect(running.server.grpc, &[]).await;
    let headers = call("Generate");
    for batch in 0..50u32 {
        let mut bytes = Vec::new();
        for i in 0..200 {
            let stream = 2 * (batch * 200 + i) + 1;
            bytes.extend(frame(HEADERS, END_HEADERS, stream, &headers));
            bytes.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        }
        if !raw.send(&bytes).await {
            break;
        }
    }
    still_serves(&running).await;
    drop(raw);
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_streams_are_open_than_the_server_says() {
    let world = World::new();
    let running = world.start().await;
    let mut raw = Raw::connect(running.server.grpc, &[]).await;
    // calls that send no message and never end
    let headers = call("Generate");
    let bytes: Vec<u8> = (0..1000).flat_map(|i| frame(HEADERS, END_HEADERS, 2 * i + 1, &headers)).collect();
    raw.send(&bytes).await;
    still_serves(&running).await;
    // as many pings as all is answered before
    raw.send(&frame(PING, 0, 0, &[7; 8])).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    drop(raw.write);
    let found = timely("the connection ends", raw.read).await.expect("no panic");
    let refused = found.iter().filter(|(kind, ..)| *kind == RST_STREAM).count();
    let closed = found.iter().any(|(kind, ..)| *kind == GOAWAY);
    assert!(closed || refused >= 1000 - 256, "{refused} of 1000 streams were refused");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_without_an_end_end_the_connection() {
    let world = World::new();
    let running = world.start().await;
    let mut raw = Raw::connect(running.server.grpc, &[]).await;
    let mut sent = 0usize;
    let mut takes = raw.send(&frame(HEADERS, 0, 1, &call("Generate"))).await;
    let more: Vec<u8> = (0..100).flat_map(|i| header(&format!("x-{i}"), &"v".repeat(100))).collect();
    while takes && sent < 64 << 20 {
        takes = raw.send(&frame(CONTINUATION, 0, 1, &more)).await;
        sent += more.len();
        if raw.read.is_finished() {
            break;
        }
    }
    assert!(sent < 64 << 20, "{sent} bytes of headers were taken");
    raw.until_closed().await;
    still_serves(&running).await;
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_larger_than_accepted_begin_no_call() {
    let world = World::new();
    let running = world.start().await;
    let mut raw = Raw::connect(running.server.grpc, &[]).await;
    // 600 of some 140 bytes, in frames of the usual size
    let big: Vec<u8> = (0..600).flat_map(|i| header(&format!("x-{i:04}"), &"v".repeat(100))).collect();
    let mut bytes = frame(HEADERS, END_STREAM, 1, &call("Generate"));
    let chunks: Vec<&[u8]> = big.chunks(16_000).collect();
    for (i, chunk) in chunks.iter().enumerate() {
        let last = if i + 1 == chunks.len() { END_HEADERS } else { 0 };
        bytes.extend(frame(CONTINUATION, last, 1, chunk));
    }
    raw.send(&bytes).await;
    still_serves(&running).await;
    drop(raw.write);
    let found = timely("the connection ends", raw.read).await.expect("no panic");
    let answered = found.iter().any(|(kind, stream, _)| *kind == DATA && *stream == 1);
    assert!(!answered, "a call with such headers has no message");
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_pings_settings_and_windows_cost_their_connection_only() {
    let world = World::new();
    let running = world.start().await;
    let ping = frame(PING, 0, 0, &[1; 8]);
    let settings = frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100]);
    let window = frame(WINDOW_UPDATE, 0, 0, &1u32.to_be_bytes());
    let empty = frame(DATA, 0, 1, &[]);
    for (flood, opens) in [(ping, false), (settings, false), (window, false), (empty, true)] {
        let mut raw = Raw::connect(running.server.grpc, &[]).await;
        if opens {
            raw.send(&frame(HEADERS, END_HEADERS, 1, &call("Generate"))).await;
        }
        let bytes = flood.repeat(2_000);
        for _ in 0..20 {
            if !raw.send(&bytes).await {
                break;
            }
        }
        still_serves(&running).await;
    }
    running.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_that_are_none_end_the_connection() {
    let world = World::new();
    let running = world.start().await;
    let broken = [
        frame(SETTINGS, 0, 0, &[1, 2, 3]),                                 // no whole setting
        frame(DATA, 0, 0, b"x"),                                           // data of no stream
        frame(HEADERS, END_HEADERS, 1, &[0xFF; 40]),                       // no HPACK
        frame(HEADERS, END_HEADERS, 2, &call("Generate")),                 // a stream of the server's numbers
        frame(CONTINUATION, END_HEADERS, 1, &[]),                          // of nothing
        frame(RST_STREAM, 0, 9, &8u32.to_be_bytes()),                      // of a stream that never was
        frame(WINDOW_UPDATE, 0, 0, &0u32.to_be_bytes()),                   // by nothing
        [&[0xFF, 0xFF, 0xFF, DATA, 0, 0, 0, 0, 1][..], &[0; 64]].concat(), // 16 MiB, it says
    ];
    for bytes in broken {
        let mut raw = Raw::connect(running.server.grpc, &[]).await;
        raw.send(&bytes).await;
        let found = raw.until_closed().await;
        assert!(found.iter().all(|(kind, ..)| *kind != DATA), "no answer to what is no call");
    }
    // and what is not HTTP/2 at all
    let mut stream = TcpStream::connect(running.server.grpc).await.expect("a connection");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: server\r\n\r\n").await.expect("it listens");
    let mut said = Vec::new();
    // closed or reset, both are an end
    drop(timely("the server closes the connection", stream.read_to_end(&mut said)).await);
    assert!(!said.starts_with(b"HTTP/1.1 200"), "{}", said.escape_ascii());
    still_serves(&running).await;
    running.stop().await;
}

/// `GenerateRequest { prompt: { text: "once" }, options: { max_new_tokens: 64, ignore_eos: true } }` in its frame.
fn message() -> Vec<u8> {
    let prompt = [0x12, 6, 0x0A, 4, b'o', b'n', b'c', b'e'];
    let options = [0x1A, 4, 0x08, 64, 0x28, 1];
    [&[0, 0, 0, 0, (prompt.len() + options.len()) as u8][..], &prompt, &options].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_with_no_window_hold_nobody_up_and_their_answers_end() {
    let world = World::new();
    let running = world.start().await;
    let mut readers = Vec::new();
    // as many as there are places, none of which ever takes a byte of its answer
    for _ in 0..16 {
        let mut raw = Raw::connect(running.server.grpc, &[(WINDOW, 0)]).await;
        let mut bytes = frame(HEADERS, END_HEADERS, 1, &call("Generate"));
        bytes.extend(frame(DATA, END_STREAM, 1, &message()));
        assert!(raw.send(&bytes).await);
        readers.push(raw);
    }
    // their sequences end for all that, and others are served
    still_serves(&running).await;
    drop(readers);
    running.stop().await;
}
