//! Connections: accepted up to a limit, given up when their peer stalls, ended gracefully.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Extension;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, Sleep};

use crate::App;
use crate::api::{Peer, router};

/// A request's head must be there after this, also the next one of an open connection.
const HEAD_TIME: Duration = Duration::from_secs(30);
/// A peer that takes nothing for this long is given up.
const STALL_TIME: Duration = Duration::from_secs(60);
/// What answers that were cut get to reach their readers.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The accepting side.
pub(crate) struct Http {
    draining: watch::Sender<bool>,
    permits: Arc<Semaphore>,
    connections: u32,
}

impl Http {
    /// Begins to accept.
    pub(crate) fn start(runtime: &Runtime, listener: TcpListener, app: Arc<App>) -> Http {
        let connections = app.options.limits.connections.clamp(1, Semaphore::MAX_PERMITS.min(1 << 20));
        let permits = Arc::new(Semaphore::new(connections));
        let (draining, drained) = watch::channel(false);
        runtime.spawn(accept(listener, Arc::clone(&permits), app, drained));
        Http { draining, permits, connections: connections as u32 }
    }

    /// Accepts no more and waits for the open connections; calls `cut` shortly before `limit` is over.
    pub(crate) async fn drain(self, limit: Duration, cut: impl FnOnce()) {
        // Without a receiver nothing is open.
        let _ = self.draining.send(true);
        let last_words = LAST_WORDS.min(limit / 4);
        let all_closed = self.permits.acquire_many(self.connections);
        tokio::pin!(all_closed);
        if tokio::time::timeout(limit - last_words, &mut all_closed).await.is_err() {
            cut();
            let _ = tokio::time::timeout(last_words, all_closed).await;
        }
    }
}

async fn accept(
    listener: TcpListener,
    permits: Arc<Semaphore>,
    app: Arc<App>,
    mut drained: watch::Receiver<bool>,
) {
    let router = router(Arc::clone(&app));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let accepted = tokio::select! {
            () = wait(&mut drained) => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, peer)) => {
                // Answers are small pieces that somebody waits for.
                let _ = stream.set_nodelay(true);
                let router = router.clone().layer(Extension(Peer(peer.ip())));
                tokio::spawn(connection(stream, router, permit, Arc::clone(&app), drained.clone()));
            }
            // Out of file descriptors, or the peer is gone already: the next one may do.
            Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
        }
    }
}

async fn connection(
    stream: TcpStream,
    router: axum::Router,
    permit: OwnedSemaphorePermit,
    app: Arc<App>,
    mut drained: watch::Receiver<bool>,
) {
    let count = |by: i64| {
        if let Some(metrics) = app.metrics(None) {
            metrics.connections.inc_by(by);
        }
    };
    count(1);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .serve_connection(TokioIo::new(Impatient::new(stream)), TowerToHyperService::new(router));
    tokio::pin!(connection);
    tokio::select! {
        // What ends a connection concerns its peer alone.
        _ = connection.as_mut() => {}
        () = wait(&mut drained) => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
    count(-1);
    drop(permit);
}

/// Until the server drains, or is gone.
async fn wait(drained: &mut watch::Receiver<bool>) {
    let _ = drained.wait_for(|drained| *drained).await;
}

/// A stream whose writes fail once the peer has taken nothing for `STALL_TIME`.
struct Impatient {
    stream: TcpStream,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Impatient {
    fn new(stream: TcpStream) -> Impatient {
        Impatient { stream, stalled: None }
    }

    fn judge<T>(&mut self, cx: &mut Context<'_>, poll: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if poll.is_ready() {
            self.stalled = None;
            return poll;
        }
        let sleep = self
            .stalled
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + STALL_TIME)));
        match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Impatient {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Impatient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.judge(cx, poll)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let poll = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.judge(cx, poll)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
