//! `GET /metrics`, and nothing else, for programs of this machine.

use super::Dialect;
use crate::{
    failure::{Context, Exit, Failure, Outcome},
    threads::named,
};
use std::{
    fmt, fs,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::{
        fs::{FileTypeExt, PermissionsExt},
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

/// Bytes of the longest request, its lines together.
const MOST_BYTES: usize = 8 << 10;
/// Clients at a time; who comes besides is turned away.
const MOST_CLIENTS: usize = 16;
/// How long a client may take for its request, and for taking the answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where to listen: on this machine alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Address {
    /// A socket in the file system.
    Unix(PathBuf),
    /// A port of a loopback address.
    Tcp(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("unix: needs a path behind it".into())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(Self::Tcp(address)),
            Ok(_) => {
                Err("not an address of this machine alone, as 127.0.0.1 is: a proxy can pass it on to a network".into())
            }
            Err(_) => Err("must be unix:PATH, or a loopback address and a port like 127.0.0.1:9926".into()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => address.fmt(f),
        }
    }
}

/// A socket that listens.
pub enum Server {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Server {
    /// Listens.
    pub fn bind(address: &Address) -> Outcome<Self> {
        let what = format!("can't listen at {address}");
        let bound = match address {
            Address::Unix(path) => bind_unix(path).map(Self::Unix),
            Address::Tcp(address) => TcpListener::bind(address).map(Self::Tcp),
        };
        match bound {
            Err(e) if matches!(e.kind(), ErrorKind::AddrInUse | ErrorKind::AlreadyExists) => {
                Err(Failure::new(Exit::Busy, format_args!("{what}: another program does, or something else is there")))
            }
            bound => bound.doing(what),
        }
    }

    /// Answers with what `metrics` says, as long as the process lives.
    pub fn run(self, metrics: impl Fn(Dialect) -> String + Send + Sync + 'static) -> ! {
        let metrics = Arc::new(metrics);
        loop {
            let client: io::Result<Box<dyn Client>> = match &self {
                Self::Unix(listener) => listener.accept().map(|(stream, _)| Box::new(stream) as _),
                Self::Tcp(listener) => listener.accept().map(|(stream, _)| Box::new(stream) as _),
            };
            // Each has one more while its thread runs.
            match client {
                Ok(mut client) if Arc::strong_count(&metrics) <= MOST_CLIENTS => {
                    let metrics = Arc::clone(&metrics);
                    // Without a thread for it the client is turned away.
                    let _ = named("client").spawn(move || client.serve(&*metrics));
                }
                Ok(_) => {}
                // No descriptors left: not as fast as it fails.
                Err(_) => thread::sleep(Duration::from_millis(10)),
            }
        }
    }
}

/// Takes the place of a socket that nobody listens at any more, and of nothing else.
fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    let is_left = || {
        fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
            && UnixStream::connect(path).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused)
    };
    if is_left() {
        fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    // Nobody else can connect before.
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

trait Client: Read + Write + Send {
    /// How long the next read or write may take.
    fn limit(&self, time: Duration) -> io::Result<()>;

    fn serve(&mut self, metrics: &dyn Fn(Dialect) -> String) {
        let answer = match self.request() {
            Ok(Some(request)) => answer(&request, metrics),
            Ok(None) => status("400 Bad Request", ""),
            // It is gone, or says nothing.
            Err(_) => return,
        };
        let _ = self.limit(PATIENCE).and_then(|()| self.write_all(&answer));
    }

    /// The lines of a request, up to the empty one; `None` where they do not end.
    fn request(&mut self) -> io::Result<Option<String>> {
        let deadline = Instant::now() + PATIENCE;
        let (mut received, mut bytes) = (Vec::new(), [0; 1024]);
        while received.len() <= MOST_BYTES {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.limit(left)?;
            match self.read(&mut bytes) {
                Ok(0) => return Ok(None),
                Ok(count) => received.extend_from_slice(&bytes[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if let Some(end) = received.windows(4).position(|four| four == b"\r\n\r\n") {
                return Ok(Some(String::from_utf8_lossy(&received[..end]).into_owned()));
            }
        }
        Ok(None)
    }
}

impl Client for UnixStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time)).and_then(|()| self.set_write_timeout(Some(time)))
    }
}

impl Client for TcpStream {
    fn limit(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time)).and_then(|()| self.set_write_timeout(Some(time)))
    }
}

fn answer(request: &str, metrics: &dyn Fn(Dialect) -> String) -> Vec<u8> {
    let mut lines = request.lines();
    let first: Vec<_> = lines.next().unwrap_or_default().split(' ').collect();
    match first[..] {
        ["GET", path, version] if version.starts_with("HTTP/1.") => match path.split('?').next() {
            Some("/metrics") => {
                let dialect = dialect(lines);
                reply("200 OK", &format!("Content-Type: {}\r\n", dialect.content_type()), &metrics(dialect))
            }
            _ => status("404 Not Found", ""),
        },
        [_, _, version] if version.starts_with("HTTP/1.") => status("405 Method Not Allowed", "Allow: GET\r\n"),
        _ => status("400 Bad Request", ""),
    }
}

/// OpenMetrics, unless the client takes the older format only.
fn dialect<'l>(headers: impl Iterator<Item = &'l str>) -> Dialect {
    let fields = headers.filter_map(|line| line.split_once(':'));
    let accepted = fields.filter(|(name, _)| name.eq_ignore_ascii_case("accept")).map(|(_, value)| value);
    let accepted = accepted.collect::<Vec<_>>().join(",").to_ascii_lowercase();
    let takes_open = accepted.contains("application/openmetrics-text");
    if accepted.contains("text/plain") && !takes_open { Dialect::Prometheus } else { Dialect::OpenMetrics }
}

fn status(status: &str, fields: &str) -> Vec<u8> {
    let fields = format!("Content-Type: text/plain; charset=utf-8\r\n{fields}");
    reply(status, &fields, &format!("{status}: there is GET /metrics\n"))
}

fn reply(status: &str, fields: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\n{fields}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GET: &str = "GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

    fn metrics(dialect: Dialect) -> String {
        format!("{dialect:?}\n")
    }

    /// All that the server says to this.
    fn said(address: &Address, request: &str) -> String {
        let mut client: Box<dyn Client> = match address {
            Address::Unix(path) => Box::new(UnixStream::connect(path).unwrap()),
            Address::Tcp(address) => Box::new(TcpStream::connect(address).unwrap()),
        };
        client.limit(Duration::from_secs(60)).unwrap();
        let _ = client.write_all(request.as_bytes());
        let mut text = Vec::new();
        let _ = client.read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    /// Servers of both kinds.
    fn started(folder: &Path) -> [Address; 2] {
        let unix = Address::Unix(folder.join("sock"));
        let tcp = Server::bind(&"127.0.0.1:0".parse().unwrap()).unwrap();
        let Server::Tcp(listener) = &tcp else { panic!("asked for a port") };
        let address = Address::Tcp(listener.local_addr().unwrap());
        for server in [Server::bind(&unix).unwrap(), tcp] {
            thread::spawn(move || server.run(metrics));
        }
        [unix, address]
    }

    #[test]
    fn metrics_are_got_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        for address in started(folder.path()) {
            let text = said(&address, GET);
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert!(
                head.starts_with("HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0"),
                "{head}"
            );
            assert!(head.contains("Content-Length: 12") && body == "OpenMetrics\n", "{text}");
            for (request, begin) in [
                ("GET /metrics?x=1 HTTP/1.0\r\n\r\n", "HTTP/1.1 200"),
                ("GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
                ("GET /metrics/ HTTP/1.1\r\n\r\n", "HTTP/1.1 404"),
                ("POST /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 405"),
                ("HEAD /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 405"),
                ("GET /metrics HTTP/2\r\n\r\n", "HTTP/1.1 400"),
                ("\r\n\r\n", "HTTP/1.1 400"),
                ("GET  /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 400"),
            ] {
                assert!(said(&address, request).starts_with(begin), "{request}");
            }
            // More than it takes: it says so if it is still heard.
            let long = said(&address, &"x".repeat(2 * MOST_BYTES));
            assert!(long.is_empty() || long.starts_with("HTTP/1.1 400"), "{long}");
        }
    }

    #[test]
    fn who_takes_the_older_format_only_gets_that() {
        let of = |accept: &str| dialect(format!("Host: x\r\naccept: {accept}").lines());
        for accept in ["*/*", "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3"] {
            assert_eq!(of(accept), Dialect::OpenMetrics, "{accept}");
        }
        assert_eq!(of("text/plain"), Dialect::Prometheus);
        assert_eq!(dialect("Host: x".lines()), Dialect::OpenMetrics);
    }

    #[test]
    fn who_says_nothing_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let [unix, _] = started(folder.path());
        let Address::Unix(path) = &unix else { panic!("the first is") };
        let silent: Vec<_> = (0..MOST_CLIENTS - 1).map(|_| UnixStream::connect(path).unwrap()).collect();
        let begun = Instant::now();
        assert!(said(&unix, GET).starts_with("HTTP/1.1 200"));
        assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
        // With one more than it serves somebody is turned away, until the silent ones are.
        let _one_more = UnixStream::connect(path).unwrap();
        while !said(&unix, GET).starts_with("HTTP/1.1 200") {
            assert!(begun.elapsed() < PATIENCE * 10, "the silent ones are kept");
            thread::sleep(Duration::from_millis(50));
        }
        drop(silent);
    }

    #[test]
    fn only_a_socket_that_is_left_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let address = Address::Unix(path.clone());
        drop(Server::bind(&address).unwrap());
        assert!(path.exists(), "left by one that has ended");
        let server = Server::bind(&address).unwrap();
        assert_eq!(Server::bind(&address).err().map(|failure| failure.exit), Some(Exit::Busy));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        drop(server);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "somebody's").unwrap();
        assert_eq!(Server::bind(&address).err().map(|failure| failure.exit), Some(Exit::Busy));
        assert_eq!(fs::read(&path).unwrap(), b"somebody's");
    }

    #[test]
    fn it_listens_on_this_machine_alone() {
        for text in ["127.0.0.1:9926", "127.8.8.8:1", "[::1]:9926", "unix:/run/x"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["0.0.0.0:9926", "192.0.2.1:80", "[::]:80"] {
            assert!(text.parse::<Address>().unwrap_err().contains("127.0.0.1"), "{text}");
        }
        for text in ["", "unix:", "9926", "localhost:9926", "/run/x", "127.0.0.1"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }
}
