//! Metrics and status over HTTP, for monitoring and for `safekeeper status`.
//!
//! | path         | answers                                                                  |
//! |--------------|--------------------------------------------------------------------------|
//! | `/metrics`   | Prometheus text                                                          |
//! | `/healthz`   | 200 while the process runs                                               |
//! | `/readyz`    | 200 if every cluster is served, else 503 and which is not                |
//! | `/v1/status` | JSON, see status.rs                                                      |
//!
//! The one place with an async runtime: it is what the library wants, it has a thread of its own,
//! and it reads published values only. Nothing on the WAL path ever waits for it.
//!
//! Nor may it take what the WAL path needs: a connection is for one request and for a few seconds,
//! and there are only so many at a time. Those beyond wait in the kernel's queue.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, oneshot};

use crate::server::Shared;
use crate::status::Status;

/// Connections at a time. A handful of monitoring tools need a few; each costs a descriptor.
pub const CONNECTIONS_MAX: usize = 32;

/// From accept to the last byte of the answer. Every answer is at hand at once, so this is the
/// patience with a slow peer, and what a silent one can take a place for.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(10);

/// Before the next try when a connection could not be accepted. Nothing tells when the process has
/// descriptors again.
const ACCEPT_RETRY: Duration = Duration::from_secs(1);

/// The thread that serves HTTP.
#[derive(Debug)]
pub struct HttpServer {
    address: SocketAddr,
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl HttpServer {
    pub fn start(listener: TcpListener, shared: Arc<Shared>) -> io::Result<HttpServer> {
        let address = listener.local_addr()?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name("http".into())
            .spawn(move || {
                if let Err(error) = runtime.block_on(serve(listener, shared, stopped)) {
                    log::error!("HTTP is not served any more: {error}");
                }
            })?;
        Ok(HttpServer {
            address,
            stop,
            thread,
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn stop(self) {
        // It fails if the thread has ended by itself.
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

/// Ends when told to; connections that are open then are dropped with the runtime.
async fn serve(
    listener: TcpListener,
    shared: Arc<Shared>,
    stopped: oneshot::Receiver<()>,
) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readyz))
        .route("/v1/status", get(status))
        .with_state(shared);
    tokio::select! {
        () = accept(listener, router) => Ok(()),
        _ = stopped => Ok(()),
    }
}

async fn accept(listener: tokio::net::TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await;
        let place = place.expect("nobody closes this semaphore");
        match listener.accept().await {
            Ok((socket, _)) => {
                let router = router.clone();
                tokio::spawn(async move {
                    serve_one(socket, router).await;
                    drop(place);
                });
            }
            Err(error) => {
                log::warn!("could not accept an HTTP connection: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
            }
        }
    }
}

async fn serve_one(socket: TcpStream, router: Router) {
    let serving = http1::Builder::new()
        .keep_alive(false)
        .serve_connection(TokioIo::new(socket), TowerToHyperService::new(router));
    match tokio::time::timeout(CONNECTION_TIMEOUT, serving).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("HTTP connection ended ({error})"),
        Err(_) => log::debug!("HTTP connection ended (too slow)"),
    }
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    let text = shared.metrics.render(&shared.clusters.status().clusters);
    let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, content_type)], text)
}

async fn readyz(State(shared): State<Arc<Shared>>) -> (StatusCode, String) {
    let status = shared.clusters.status();
    let broken: Vec<String> = status
        .clusters
        .iter()
        .filter_map(|cluster| {
            let error = cluster.error.as_ref()?;
            Some(format!("cluster {}: {error}\n", cluster.label()))
        })
        .collect();
    if shared.is_stopping() {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping\n".into())
    } else if broken.is_empty() {
        (StatusCode::OK, "ready\n".into())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, broken.concat())
    }
}

async fn status(State(shared): State<Arc<Shared>>) -> Json<Status> {
    Json(shared.clusters.status())
}
