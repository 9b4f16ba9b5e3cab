//! A network link: a TCP proxy between two processes, which delays, cuts and heals.
//!
//! ```text
//!   client ──► reader ──► queue: pieces with their due times ──► writer ──► target
//!          ◄──────────────────────── and the same back ◄──────────────────────
//! ```
//!
//! A cut direction delivers nothing and says nothing, as a real network that drops packets; what
//! was sent meanwhile comes when it heals, as TCP sends it again. [`Link::break_connections`] is
//! the other kind of failure, which both ends see. [`Link::flip_bit`] is the third: a network card
//! or a switch that damages what TCP's weak checksum lets through.
//!
//! A thread ends when its socket does; dropping the link closes them all.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crate::place::unused_address;

/// One link. Connect to [`Link::address`] instead of the target.
pub struct Link {
    address: SocketAddr,
    shared: Arc<Shared>,
}

/// Which way bytes flow, seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    ToTarget,
    FromTarget,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    delay: Duration,
    cut_to_target: bool,
    cut_from_target: bool,
    /// The next piece to the target that is at least so long is damaged, if any.
    flip_bit_in: Option<usize>,
    closed: bool,
    connections: Vec<TcpStream>,
}

impl State {
    fn is_cut(&self, direction: Direction) -> bool {
        match direction {
            Direction::ToTarget => self.cut_to_target,
            Direction::FromTarget => self.cut_from_target,
        }
    }
}

impl Link {
    pub fn to(target: SocketAddr) -> Link {
        let shared = Arc::new(Shared::default());
        let (ending, starting) = (shared.clone(), shared.clone());
        let address = listen_for(
            target,
            move || ending.lock().closed,
            move |client, server| start_connection(client, server, &starting),
        );
        Link { address, shared }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Every byte from now on arrives so much later, in both directions.
    pub fn delay(&self, delay: Duration) {
        self.change(|state| state.delay = delay);
    }

    pub fn cut(&self, direction: Direction) {
        self.change(|state| match direction {
            Direction::ToTarget => state.cut_to_target = true,
            Direction::FromTarget => state.cut_from_target = true,
        });
    }

    pub fn cut_both(&self) {
        self.cut(Direction::ToTarget);
        self.cut(Direction::FromTarget);
    }

    /// Undoes every cut; what was held back is delivered.
    pub fn heal(&self) {
        self.change(|state| (state.cut_to_target, state.cut_from_target) = (false, false));
    }

    /// Closes all connections; new ones are accepted.
    pub fn break_connections(&self) {
        self.change(close_connections);
    }

    /// Flips one bit in the middle of the next piece of at least `len` bytes to the target.
    pub fn flip_bit(&self, len: usize) {
        self.change(|state| state.flip_bit_in = Some(len));
    }

    /// Whether the bit that was asked for has been flipped.
    pub fn has_flipped(&self) -> bool {
        self.shared.lock().flip_bit_in.is_none()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }

    fn damage(&self, piece: &mut [u8]) {
        let mut state = self.lock();
        if state.flip_bit_in.is_some_and(|len| piece.len() >= len) {
            state.flip_bit_in = None;
            piece[piece.len() / 2] ^= 0x10;
        }
    }

    /// Waits while the direction is cut. False when the link is closed.
    fn wait_passable(&self, direction: Direction) -> bool {
        let blocked = |state: &mut State| state.is_cut(direction) && !state.closed;
        let state = self.changed.wait_while(self.lock(), blocked);
        !state.expect("no holder of the lock panics").closed
    }

    /// Waits until a moment has come. False when the link is closed.
    fn wait_due(&self, due: Instant) -> bool {
        let mut state = self.lock();
        loop {
            let left = due.saturating_duration_since(Instant::now());
            if state.closed || left.is_zero() {
                return !state.closed;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.expect("no holder of the lock panics").0;
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.change(|state| {
            state.closed = true;
            close_connections(state);
        });
        // Wakes the accepting thread, which then sees that the link is closed.
        let _ = TcpStream::connect(self.address);
    }
}

fn close_connections(state: &mut State) {
    for connection in state.connections.drain(..) {
        // It may have been closed by its other end.
        let _ = connection.shutdown(Shutdown::Both);
    }
}

/// Accepts connections at an address of its own, on a thread, until one comes when `is_closed`. Each is
/// given to `start`, together with one to the target; neither of the two delays small packets.
pub fn listen_for(
    target: SocketAddr,
    is_closed: impl Fn() -> bool + Send + 'static,
    start: impl Fn(TcpStream, TcpStream) -> std::io::Result<()> + Send + 'static,
) -> SocketAddr {
    let address = unused_address();
    let listener = TcpListener::bind(address).expect("the address is ours alone");
    let connect = move |client: TcpStream| {
        let server = TcpStream::connect(target)?;
        client.set_nodelay(true)?;
        server.set_nodelay(true)?;
        start(client, server)
    };
    thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else { continue };
            if is_closed() {
                return;
            }
            // A target that is down is what the client sees as a connection closed at once; without
            // both halves there is none either.
            let _ = connect(client);
        }
    });
    address
}

fn start_connection(
    client: TcpStream,
    server: TcpStream,
    shared: &Arc<Shared>,
) -> std::io::Result<()> {
    let ends = [client.try_clone()?, server.try_clone()?];
    let (client2, server2) = (client.try_clone()?, server.try_clone()?);
    shared.lock().connections.extend(ends);
    start_direction(client, server, Direction::ToTarget, shared);
    start_direction(server2, client2, Direction::FromTarget, shared);
    Ok(())
}

fn start_direction(from: TcpStream, to: TcpStream, direction: Direction, shared: &Arc<Shared>) {
    // So many pieces may be under way: enough for a gigabit at 100 ms, little memory.
    let (sender, queue) = sync_channel(256);
    let (reading, writing) = (shared.clone(), shared.clone());
    thread::spawn(move || read_all(from, &sender, &reading));
    thread::spawn(move || write_all(to, &queue, direction, &writing));
}

type Piece = (Instant, Vec<u8>);

fn read_all(mut from: TcpStream, queue: &SyncSender<Piece>, shared: &Shared) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = from.read(&mut buffer).unwrap_or(0);
        let due = Instant::now() + shared.lock().delay;
        // An empty piece tells the writer that the connection ended.
        if queue.send((due, buffer[..len].to_vec())).is_err() || len == 0 {
            return;
        }
    }
}

fn write_all(mut to: TcpStream, queue: &Receiver<Piece>, direction: Direction, shared: &Shared) {
    for (due, mut piece) in queue {
        if direction == Direction::ToTarget {
            shared.damage(&mut piece);
        }
        let passes = shared.wait_due(due) && shared.wait_passable(direction);
        if !passes || piece.is_empty() || to.write_all(&piece).is_err() {
            break;
        }
    }
    // The other direction may go on: a half-closed connection is a legal thing.
    let _ = to.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A target that sends back what it gets.
    fn echo() -> SocketAddr {
        let address = unused_address();
        let listener = TcpListener::bind(address).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                thread::spawn(move || std::io::copy(&mut stream.try_clone().unwrap(), &mut stream));
            }
        });
        address
    }

    fn connect(link: &Link) -> TcpStream {
        let stream = TcpStream::connect(link.address()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        stream
    }

    fn ask(stream: &mut TcpStream) -> Duration {
        let start = Instant::now();
        stream.write_all(b"x").unwrap();
        stream.read_exact(&mut [0]).unwrap();
        start.elapsed()
    }

    #[test]
    fn delays_each_direction() {
        let link = Link::to(echo());
        let mut stream = connect(&link);
        ask(&mut stream);
        link.delay(Duration::from_millis(100));
        assert!(ask(&mut stream) >= Duration::from_millis(200));
    }

    #[test]
    fn what_was_sent_while_cut_arrives_after_healing() {
        for direction in [Direction::ToTarget, Direction::FromTarget] {
            let link = Link::to(echo());
            let mut stream = connect(&link);
            ask(&mut stream);
            link.cut(direction);
            stream.write_all(b"y").unwrap();
            stream
                .set_read_timeout(Some(Duration::from_millis(100)))
                .unwrap();
            assert!(stream.read_exact(&mut [0]).is_err(), "{direction:?}");
            link.heal();
            stream
                .set_read_timeout(Some(Duration::from_secs(10)))
                .unwrap();
            stream.read_exact(&mut [0]).unwrap();
        }
    }

    #[test]
    fn one_bit_is_flipped_once() {
        let link = Link::to(echo());
        let mut stream = connect(&link);
        link.flip_bit(3);
        let mut answer = |sent: &[u8]| {
            stream.write_all(sent).unwrap();
            let mut bytes = vec![0; sent.len()];
            stream.read_exact(&mut bytes).unwrap();
            bytes
        };
        assert_eq!(answer(&[0; 2]), [0; 2]);
        assert_eq!(answer(&[0; 4]), [0, 0, 0x10, 0]);
        assert_eq!(answer(&[0; 4]), [0; 4]);
        assert!(link.has_flipped());
    }

    #[test]
    fn broken_connections_end_and_new_ones_work() {
        let link = Link::to(echo());
        let mut stream = connect(&link);
        ask(&mut stream);
        link.break_connections();
        assert_eq!(stream.read(&mut [0]).unwrap_or(0), 0);
        ask(&mut connect(&link));
    }
}
