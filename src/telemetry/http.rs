//! The metrics page: `/metrics`, `/live`, `/ready`; everything else is 404.
//!
//! Anyone who reaches the address may ask, so a client costs little: one exchange per connection (scrapers
//! come every 15 s or so, keep-alive saves them nothing), a deadline on the exchange as a whole, which covers a
//! client that sends half a header as well as one that never reads, and a bound on the number of connections.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State as Shared;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::metrics::Metrics;
use super::readiness::{Readiness, State};

/// Content type of the OpenMetrics text format.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Bytes of a request's line and headers together. Prometheus sends about 300.
const REQUEST_HEAD_BYTES_MAX: usize = 16 << 10;

/// How long to wait after an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Limits on clients of the page.
#[derive(Debug, Clone, Copy)]
pub struct HttpLimits {
    /// Connections at a time; further ones wait in the kernel's queue.
    pub connections_max: u32,
    /// From accepting a connection to the last byte of the reply.
    pub exchange_timeout: Duration,
}

/// Has the parts of the daemon bring their gauges up to date before a page is written.
#[derive(Debug, Clone)]
pub struct Collector(mpsc::Sender<oneshot::Sender<()>>);

/// The other end of a [`Collector`]: each request is answered once the gauges are up to date.
pub type Collections = mpsc::Receiver<oneshot::Sender<()>>;

impl Collector {
    /// A collector and its other end.
    pub fn new() -> (Collector, Collections) {
        let (asks, collections) = mpsc::channel(1);
        (Collector(asks), collections)
    }

    async fn collect(&self) {
        let (done, collected) = oneshot::channel();
        // While the daemon stops nobody answers: the page shows what was last known.
        if self.0.send(done).await.is_ok() {
            let _ = collected.await;
        }
    }
}

#[derive(Clone)]
struct Page {
    collector: Collector,
    metrics: Arc<Metrics>,
    readiness: Arc<Readiness>,
}

/// Serves the page until `shutdown` ends, then lets open exchanges end (their deadline bounds that).
///
/// Runs on a current-thread runtime, `tokio_uring::start` included.
pub async fn serve(
    listener: TcpListener,
    collector: Collector,
    metrics: Arc<Metrics>,
    readiness: Arc<Readiness>,
    limits: HttpLimits,
    shutdown: impl Future<Output = ()>,
) {
    let router = Router::new()
        .route("/metrics", get(metrics_page))
        .route("/live", get(live))
        .route("/ready", get(ready))
        .with_state(Page { collector, metrics, readiness });
    let connections_max = usize::try_from(limits.connections_max).unwrap_or(usize::MAX);
    let mut exchanges = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = exchanges.join_next() => {}
            accepted = listener.accept(), if exchanges.len() < connections_max => match accepted {
                Ok((stream, _)) => {
                    exchanges.spawn(tokio::time::timeout(limits.exchange_timeout, exchange(stream, router.clone())));
                }
                Err(error) => {
                    // Out of descriptors, most likely: accepting again at once would spin.
                    tracing::warn!(%error, "the metrics page cannot accept a connection");
                    let pause = tokio::time::timeout(ACCEPT_PAUSE, std::future::pending::<()>());
                    tokio::select! {
                        () = &mut shutdown => break,
                        _ = pause => {}
                    }
                }
            },
        }
    }
    drop(listener);
    while exchanges.join_next().await.is_some() {}
}

/// One request and its reply. How it ended is the client's business only.
async fn exchange(stream: TcpStream, router: Router) {
    let served = http1::Builder::new()
        .keep_alive(false)
        .max_buf_size(REQUEST_HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a client of the metrics page went away");
    }
}

async fn metrics_page(Shared(page): Shared<Page>) -> impl IntoResponse {
    page.collector.collect().await;
    ([(header::CONTENT_TYPE, OPENMETRICS)], page.metrics.encode())
}

async fn live() -> &'static str {
    "live\n"
}

async fn ready(Shared(page): Shared<Page>) -> impl IntoResponse {
    let state = page.readiness.get();
    let status = if state == State::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{state}\n"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpStream as Client};

    use tokio::sync::oneshot;
    use tokio::task::{JoinHandle, spawn_blocking};

    use super::*;

    struct Server {
        address: SocketAddr,
        readiness: Arc<Readiness>,
        stop: oneshot::Sender<()>,
        task: JoinHandle<()>,
    }

    async fn start(limits: HttpLimits) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let readiness = Arc::new(Readiness::new());
        let (stop, stopped) = oneshot::channel::<()>();
        let served =
            serve(listener, Collector::new().0, Arc::new(Metrics::new()), readiness.clone(), limits, async {
                stopped.await.ok();
            });
        Server { address, readiness, stop, task: tokio::spawn(served) }
    }

    fn patient() -> HttpLimits {
        HttpLimits { connections_max: 4, exchange_timeout: Duration::from_secs(60) }
    }

    impl Server {
        /// What the server answers to these bytes, until it closes the connection.
        async fn ask(&self, bytes: &str) -> String {
            let (address, bytes) = (self.address, bytes.to_owned());
            spawn_blocking(move || {
                let mut client = Client::connect(address).unwrap();
                client.write_all(bytes.as_bytes()).unwrap();
                let mut answer = String::new();
                // A reset is an answer too: the server closed with bytes of ours unread.
                client.read_to_string(&mut answer).ok();
                answer
            })
            .await
            .unwrap()
        }

        async fn get(&self, path: &str) -> String {
            self.ask(&format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n")).await
        }

        async fn end(self) {
            self.stop.send(()).unwrap();
            self.task.await.unwrap();
            assert!(Client::connect(self.address).is_err(), "the listener is closed");
        }
    }

    #[tokio::test]
    async fn serves_its_three_pages_and_nothing_else() {
        let server = start(patient()).await;
        let metrics = server.get("/metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200"), "{metrics}");
        assert!(metrics.contains("content-type: application/openmetrics-text; version=1.0.0"), "{metrics}");
        assert!(metrics.contains("lodestream_build_info{") && metrics.ends_with("# EOF\n"), "{metrics}");
        assert!(server.get("/live").await.starts_with("HTTP/1.1 200"));
        assert!(server.get("/").await.starts_with("HTTP/1.1 404"));
        assert!(server.get("/metrics/..").await.starts_with("HTTP/1.1 404"));
        assert!(server.ask("POST /metrics HTTP/1.1\r\nHost: n\r\n\r\n").await.starts_with("HTTP/1.1 405"));
        server.end().await;
    }

    #[tokio::test]
    async fn ready_says_why_not() {
        let server = start(patient()).await;
        for (state, status, reason) in [
            (State::Starting, "503", "starting\n"),
            (State::Preloading { done: 1, total: 2 }, "503", "preloading 1 of 2\n"),
            (State::Ready, "200", "ready\n"),
            (State::Draining, "503", "draining\n"),
        ] {
            server.readiness.set(state);
            let answer = server.get("/ready").await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            assert!(answer.ends_with(reason), "{answer}");
        }
        server.end().await;
    }

    #[tokio::test]
    async fn a_client_that_stays_with_half_a_header_is_let_go() {
        let server =
            start(HttpLimits { connections_max: 1, exchange_timeout: Duration::from_millis(50) }).await;
        // The only connection is taken; the next client is served when the deadline has passed.
        assert_eq!(server.ask("GET /metr").await, "");
        assert!(server.get("/live").await.starts_with("HTTP/1.1 200"));
        server.end().await;
    }

    #[tokio::test]
    async fn a_head_without_end_is_refused() {
        let server = start(patient()).await;
        let endless = format!("GET /live HTTP/1.1\r\nX: {}", "x".repeat(2 * REQUEST_HEAD_BYTES_MAX));
        let answer = server.ask(&endless).await;
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431"), "{answer}");
        server.end().await;
    }

    #[tokio::test]
    async fn rubbish_is_refused() {
        let server = start(patient()).await;
        assert!(server.ask("\0\u{1}\r\n\r\n").await.starts_with("HTTP/1.1 400"));
        server.end().await;
    }

    #[tokio::test]
    async fn connections_beyond_the_limit_wait_for_an_exchange_to_end() {
        let server =
            start(HttpLimits { connections_max: 1, exchange_timeout: Duration::from_secs(60) }).await;
        let address = server.address;
        let (first, second) = spawn_blocking(move || {
            let mut first = Client::connect(address).unwrap();
            first.write_all(b"GET /live HTTP/1.1\r\n").unwrap();
            let mut second = Client::connect(address).unwrap();
            second.write_all(b"GET /live HTTP/1.1\r\nHost: n\r\n\r\n").unwrap();
            second.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
            let early = second.read(&mut [0; 1]);
            assert!(early.is_err(), "the second was served beside the first");
            first.write_all(b"Host: n\r\n\r\n").unwrap();
            let (mut one, mut two) = (String::new(), String::new());
            first.read_to_string(&mut one).unwrap();
            second.set_read_timeout(None).unwrap();
            second.read_to_string(&mut two).unwrap();
            first.shutdown(Shutdown::Both).ok();
            (one, two)
        })
        .await
        .unwrap();
        assert!(first.starts_with("HTTP/1.1 200") && second.starts_with("HTTP/1.1 200"));
        server.end().await;
    }
}
