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

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::sync::oneshot;

use crate::server::Shared;
use crate::status::Status;

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
            .enable_io()
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
    let serving = axum::serve(listener, router);
    tokio::select! {
        served = serving.into_future() => served,
        _ = stopped => Ok(()),
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
