//! A link that a test holds in its hand: forwards TCP to one address until so many bytes have come back through it, then
//! holds on until more are allowed, or until it is cut.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};

/// Bytes that are forwarded at a time.
const PIECE: usize = 16 << 10;

#[derive(Default)]
struct State {
    /// Bytes that may still come back.
    allowed: u64,
    passed: u64,
    cut: bool,
    open: Vec<TcpStream>,
}

/// The link. Its threads end with their connections.
pub struct Gate {
    pub address: SocketAddr,
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl Gate {
    /// A link to `target` that lets `allowed` bytes back.
    pub fn to(target: SocketAddr, allowed: u64) -> Gate {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new((Mutex::new(State { allowed, ..State::default() }), Condvar::new()));
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(target) else { continue };
                let mut state = accepting.0.lock().unwrap();
                if state.cut {
                    continue;
                }
                state.open.extend([client.try_clone().unwrap(), server.try_clone().unwrap()]);
                drop(state);
                let (to, from) = (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || forward(from, to, None));
                let shared = Arc::clone(&accepting);
                std::thread::spawn(move || forward(server, client, Some(&shared)));
            }
        });
        Gate { address, shared }
    }

    /// Lets more bytes back.
    pub fn allow(&self, bytes: u64) {
        let mut state = self.shared.0.lock().unwrap();
        state.allowed = state.allowed.saturating_add(bytes);
        self.shared.1.notify_all();
    }

    /// Lets just so many bytes back from now on.
    pub fn limit(&self, bytes: u64) {
        self.shared.0.lock().unwrap().allowed = bytes;
    }

    /// Waits until all that is allowed has come back.
    pub fn wait_until_used_up(&self) {
        let state = self.shared.0.lock().unwrap();
        drop(self.shared.1.wait_while(state, |state| state.allowed > 0).unwrap());
    }

    /// Bytes that came back.
    pub fn passed(&self) -> u64 {
        self.shared.0.lock().unwrap().passed
    }

    /// Ends all connections, and lets no new ones through.
    pub fn cut(&self) {
        let mut state = self.shared.0.lock().unwrap();
        state.cut = true;
        for stream in state.open.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        self.shared.1.notify_all();
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.cut();
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, counted: Option<&(Mutex<State>, Condvar)>) {
    let mut buffer = [0; PIECE];
    loop {
        let most = match counted {
            None => PIECE,
            Some((state, changed)) => {
                let state = changed.wait_while(state.lock().unwrap(), |s| s.allowed == 0 && !s.cut).unwrap();
                if state.cut {
                    break;
                }
                PIECE.min(usize::try_from(state.allowed).unwrap_or(PIECE))
            }
        };
        let Ok(bytes @ 1..) = from.read(&mut buffer[..most]) else { break };
        if let Some((state, changed)) = counted {
            let mut state = state.lock().unwrap();
            state.allowed = state.allowed.saturating_sub(bytes as u64);
            state.passed += bytes as u64;
            changed.notify_all();
        }
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
