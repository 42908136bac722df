//! Connections as they come in, encrypted where the server has a certificate.
//!
//! Handshakes run beside the accept loop, each for a bounded time. Their number is bounded, too: where there are too many, the
//! one that has taken longest makes room, so that connections which never finish theirs keep nobody out.

use std::{
    collections::VecDeque,
    io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures::{Stream, stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::transport::server::Connected;

use crate::{
    access::{Access, PeerCertificate},
    telemetry::names,
};

/// Longest handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at a time.
const MAX_HANDSHAKES: usize = 256;
/// Time until the next try where the system accepts nothing, as without file descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// The other end of a connection; an extension of its requests.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    /// The client's certificate, verified, if it has one.
    pub(super) certificate: Option<Arc<PeerCertificate>>,
    /// Where it calls from.
    pub(super) address: SocketAddr,
}

/// All connections to a listener, once their handshakes are done; never ends.
pub(super) fn connections(listener: TcpListener, access: Arc<Access>) -> impl Stream<Item = io::Result<Connection>> {
    stream::unfold(Incoming::new(listener, access, MAX_HANDSHAKES), |mut incoming| async move {
        let connection = incoming.next().await;
        Some((Ok(connection), incoming))
    })
}

struct Incoming {
    listener: TcpListener,
    access: Arc<Access>,
    max_handshakes: usize,
    handshakes: JoinSet<Option<Connection>>,
    /// Handshakes from the oldest on; some may be done.
    begun: VecDeque<AbortHandle>,
}

impl Incoming {
    fn new(listener: TcpListener, access: Arc<Access>, max_handshakes: usize) -> Self {
        Self { listener, access, max_handshakes, handshakes: JoinSet::new(), begun: VecDeque::new() }
    }

    async fn next(&mut self) -> Connection {
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(done) = self.handshakes.join_next() => match done {
                    Ok(Some(connection)) => return connection,
                    // it failed, which was counted, or had to make room
                    Ok(None) | Err(_) => continue,
                },
            };
            match accepted {
                Ok((stream, address)) => {
                    if let Some(plain) = self.begin(stream, address) {
                        return plain;
                    }
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection can be accepted");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// A connection without TLS as it is; one with TLS comes when its handshake is done.
    fn begin(&mut self, stream: TcpStream, address: SocketAddr) -> Option<Connection> {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "no TCP_NODELAY");
        }
        let Some(config) = self.access.tls() else {
            return Some(Connection { io: Io::Plain(stream), peer: Peer { certificate: None, address } });
        };
        self.make_room();
        self.begun.push_back(self.handshakes.spawn(handshake(TlsAcceptor::from(config), stream, address)));
        None
    }

    fn make_room(&mut self) {
        while self.begun.front().is_some_and(AbortHandle::is_finished) {
            self.begun.pop_front();
        }
        if self.begun.len() >= self.max_handshakes {
            self.begun.retain(|handshake| !handshake.is_finished());
        }
        if self.begun.len() >= self.max_handshakes
            && let Some(oldest) = self.begun.pop_front()
        {
            oldest.abort();
            failed("crowded");
        }
    }
}

fn failed(reason: &'static str) {
    metrics::counter!(names::TLS_FAILURES, "reason" => reason).increment(1);
}

/// An error of the connection that would have come next, not of the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

async fn handshake(acceptor: TlsAcceptor, stream: TcpStream, address: SocketAddr) -> Option<Connection> {
    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => {
            let (_, session) = stream.get_ref();
            let leaf = session.peer_certificates().and_then(<[_]>::first);
            let certificate = leaf.and_then(|leaf| PeerCertificate::read(leaf)).map(Arc::new);
            Some(Connection { io: Io::Tls(Box::new(stream)), peer: Peer { certificate, address } })
        }
        Ok(Err(error)) => {
            tracing::debug!(%address, %error, "a TLS handshake failed");
            failed("failed");
            None
        }
        Err(_) => {
            failed("timeout");
            None
        }
    }
}

/// One connection.
pub(super) struct Connection {
    io: Io,
    peer: Peer,
}

enum Io {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_read(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write(cx, buf),
            Io::Tls(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_flush(cx),
            Io::Tls(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_shutdown(cx),
            Io::Tls(io) => Pin::new(io).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.io {
            Io::Plain(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Io::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.io {
            Io::Plain(io) => io.is_write_vectored(),
            Io::Tls(io) => io.is_write_vectored(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, KeyPair};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::access::{AccessConfig, TlsFiles};

    fn encrypted() -> Access {
        let dir = tempfile::tempdir().expect("a folder");
        let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
        let pair = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec!["localhost".to_owned()]).expect("names");
        std::fs::write(&certificate, params.self_signed(&pair).expect("a certificate").pem()).expect("a file");
        std::fs::write(&key, pair.serialize_pem()).expect("a file");
        let tls = Some(TlsFiles { certificate, key, clients: None });
        Access::open(&AccessConfig { tls, ..AccessConfig::default() }).expect("a certificate")
    }

    async fn listening(access: Access, max: usize) -> (Incoming, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        (Incoming::new(listener, Arc::new(access), max), address)
    }

    #[tokio::test]
    async fn the_handshake_that_has_taken_longest_makes_room() {
        let (mut incoming, address) = listening(encrypted(), 2).await;
        let mut waiting = Vec::new();
        for n in 1..=3 {
            waiting.push(TcpStream::connect(address).await.expect("a connection"));
            let (stream, from) = incoming.listener.accept().await.expect("it is accepted");
            assert!(incoming.begin(stream, from).is_none());
            assert_eq!(incoming.begun.len(), n.min(2));
        }
        let first = &mut waiting[0];
        let closed = async {
            // closed by the server: nothing to read, or a reset
            assert!(!matches!(first.read(&mut [0; 8]).await, Ok(n) if n > 0));
        };
        tokio::select! {
            done = tokio::time::timeout(HANDSHAKE / 2, closed) => assert!(done.is_ok(), "the first is not closed"),
            _ = incoming.next() => panic!("nobody finished a handshake"),
        }
        assert_eq!(incoming.begun.iter().filter(|h| !h.is_finished()).count(), 2);
    }

    #[tokio::test]
    async fn a_handshake_that_fails_is_dropped_and_a_plain_connection_is_handed_on() {
        let (mut incoming, address) = listening(encrypted(), 8).await;
        let mut plain = TcpStream::connect(address).await.expect("a connection");
        plain.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("it is sent");
        let closed = async {
            // an alert may come first
            let mut all = Vec::new();
            drop(plain.read_to_end(&mut all).await);
        };
        tokio::select! {
            done = tokio::time::timeout(HANDSHAKE / 2, closed) => assert!(done.is_ok(), "it is not closed"),
            _ = incoming.next() => panic!("it is no handshake"),
        }
        let (mut incoming, address) = listening(Access::open(&AccessConfig::default()).expect("no files"), 8).await;
        let _client = TcpStream::connect(address).await.expect("a connection");
        let connection = incoming.next().await;
        assert!(matches!(connection.io, Io::Plain(_)) && connection.connect_info().certificate.is_none());
    }
}
