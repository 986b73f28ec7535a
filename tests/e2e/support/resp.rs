//! The smallest client that can be an application: blocking, one command at a time, with a bound on every wait. Not the
//! operator's own client: a mistake there must not hide here.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, sync_channel},
    time::Duration,
};

/// Port of every member and Service.
pub const PORT: u16 = 6379;
/// Pieces of a tunnel's answers that may wait to be read: a reader that is far behind is not measured.
const PIECES_MAX: usize = 1024;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// `+` and `$`.
    Text(String),
    /// `-`.
    Error(String),
    /// `:`.
    Integer(i64),
    /// `$-1`.
    Nil,
    /// `*`.
    List(Vec<Reply>),
}

impl Reply {
    /// The text, if it is one.
    pub fn text(&self) -> Option<&str> {
        match self {
            Reply::Text(text) => Some(text),
            Reply::Error(_) | Reply::Integer(_) | Reply::Nil | Reply::List(_) => None,
        }
    }

    /// The number, if it is one.
    pub fn integer(&self) -> Option<i64> {
        match self {
            Reply::Integer(number) => Some(*number),
            Reply::Error(_) | Reply::Text(_) | Reply::Nil | Reply::List(_) => None,
        }
    }

    /// The elements, if it is a list.
    pub fn list(&self) -> &[Reply] {
        match self {
            Reply::List(list) => list,
            Reply::Text(_) | Reply::Error(_) | Reply::Integer(_) | Reply::Nil => &[],
        }
    }
}

/// How addresses of the cluster are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// This process is in the cluster's network.
    Direct,
    /// Through a shell in a pod, by `kubectl exec`: its round trip is part of every figure.
    Through {
        /// Namespace of the pod.
        namespace: String,
        /// The pod: any with `nc`, or with bash.
        pod: String,
    },
}

/// A connection that has logged in.
pub struct Connection {
    reader: BufReader<Box<dyn Read + Send>>,
    writer: Box<dyn Write + Send>,
    tunnel: Option<Child>,
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(child) = &mut self.tunnel {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Connection {
    /// Connects and logs in as the application's user. `timeout` bounds each wait from then on, too.
    pub fn open(reach: &Reach, address: IpAddr, password: &str, timeout: Duration) -> io::Result<Connection> {
        let mut connection = match reach {
            Reach::Direct => Connection::open_without_password(address, PORT, timeout)?,
            Reach::Through { namespace, pod } => Connection::tunnelled(namespace, pod, address, timeout)?,
        };
        match connection.call(&["AUTH", password])? {
            Reply::Text(_) => Ok(connection),
            refused @ (Reply::Error(_) | Reply::Integer(_) | Reply::Nil | Reply::List(_)) => {
                Err(io::Error::other(format!("AUTH: {refused:?}")))
            }
        }
    }

    /// Connects directly, and does not log in.
    pub fn open_without_password(address: IpAddr, port: u16, timeout: Duration) -> io::Result<Connection> {
        let stream = TcpStream::connect_timeout(&SocketAddr::new(address, port), timeout)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let writer = stream.try_clone()?;
        Ok(Connection { reader: BufReader::new(Box::new(stream)), writer: Box::new(writer), tunnel: None })
    }

    fn tunnelled(namespace: &str, pod: &str, address: IpAddr, timeout: Duration) -> io::Result<Connection> {
        let script = format!(
            "if command -v nc >/dev/null; then exec nc {address} {PORT}; fi; \
             exec bash -c 'exec 3<>/dev/tcp/{address}/{PORT}; cat <&3 & exec cat >&3'"
        );
        let mut child = Command::new("kubectl")
            .args(["exec", "-i", "-n", namespace, pod, "--", "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("no pipes to kubectl"));
        };
        let reader = Pieces::of(stdout, timeout);
        Ok(Connection {
            reader: BufReader::new(Box::new(reader)),
            writer: Box::new(stdin),
            tunnel: Some(child),
        })
    }

    /// Sends one command and reads its answer. After an error the connection is of no more use.
    pub fn call(&mut self, words: &[&str]) -> io::Result<Reply> {
        self.writer.write_all(command(words).as_bytes())?;
        self.writer.flush()?;
        self.read()
    }

    /// Sends commands all at once and reads their answers, in order. Answers of so many must fit into what the network buffers.
    pub fn call_all(&mut self, commands: &[Vec<&str>]) -> io::Result<Vec<Reply>> {
        let text: String = commands.iter().map(|words| command(words)).collect();
        self.writer.write_all(text.as_bytes())?;
        self.writer.flush()?;
        commands.iter().map(|_| self.read()).collect()
    }

    fn read(&mut self) -> io::Result<Reply> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        let Some(rest) = line.strip_suffix("\r\n") else { return Err(io::ErrorKind::UnexpectedEof.into()) };
        let garbled = || io::Error::other(format!("not an answer: {rest:?}"));
        let (kind, rest) = rest.split_at_checked(1).ok_or_else(garbled)?;
        let number = || rest.parse::<i64>().map_err(|_| garbled());
        match kind {
            "+" => Ok(Reply::Text(rest.to_owned())),
            "-" => Ok(Reply::Error(rest.to_owned())),
            ":" => Ok(Reply::Integer(number()?)),
            "$" => self.read_bulk(number()?),
            "*" => (0..number()?).map(|_| self.read()).collect::<io::Result<Vec<_>>>().map(Reply::List),
            _ => Err(garbled()),
        }
    }

    fn read_bulk(&mut self, length: i64) -> io::Result<Reply> {
        let Ok(length) = usize::try_from(length) else { return Ok(Reply::Nil) };
        let mut bytes = vec![0; length + 2];
        self.reader.read_exact(&mut bytes)?;
        bytes.truncate(length);
        Ok(Reply::Text(String::from_utf8_lossy(&bytes).into_owned()))
    }

    /// The address at which whoever serves this connection has it: another than where it leads if a member's agent passes it on.
    pub fn served_at(&mut self) -> io::Result<Option<IpAddr>> {
        let reply = self.call(&["CLIENT", "INFO"])?;
        let text = reply.text().unwrap_or_default();
        let local = text.split(' ').find_map(|field| field.strip_prefix("laddr="));
        Ok(local.and_then(|at| at.parse::<SocketAddr>().ok()).map(|at| at.ip()))
    }

    /// The role: `master`, or `slave` with the address it follows and the state of its link.
    pub fn role(&mut self) -> io::Result<Role> {
        let reply = self.call(&["ROLE"])?;
        let word = |i: usize| reply.list().get(i).and_then(Reply::text).unwrap_or_default().to_owned();
        Ok(match word(0).as_str() {
            "master" => Role::Primary,
            _ => Role::Replica { of: word(1), link: word(3) },
        })
    }

    /// One field of INFO.
    pub fn info(&mut self, section: &str, field: &str) -> io::Result<Option<String>> {
        let reply = self.call(&["INFO", section])?;
        let text = reply.text().unwrap_or_default();
        let found = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        Ok(found.map(|value| value.trim_end().to_owned()))
    }
}

fn command(words: &[&str]) -> String {
    let mut text = format!("*{}\r\n", words.len());
    for word in words {
        text.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    text
}

/// What a server says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Role {
    /// It accepts writes.
    Primary,
    /// It follows.
    Replica {
        /// Address of whom it follows.
        of: String,
        /// `connected` if it hears.
        link: String,
    },
}

/// A pipe with a bound on each wait.
struct Pieces {
    pieces: Receiver<Vec<u8>>,
    timeout: Duration,
    rest: Vec<u8>,
}

impl Pieces {
    fn of(mut pipe: impl Read + Send + 'static, timeout: Duration) -> Pieces {
        let (sender, pieces) = sync_channel(PIECES_MAX);
        // Ends with the pipe, and the pipe with its process.
        std::thread::spawn(move || {
            let mut buffer = [0; 16 * 1024];
            while let Ok(count) = pipe.read(&mut buffer) {
                let piece = buffer.get(..count).unwrap_or_default().to_vec();
                if count == 0 || sender.send(piece).is_err() {
                    return;
                }
            }
        });
        Pieces { pieces, timeout, rest: Vec::new() }
    }
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.rest.is_empty() {
            // An ended pipe is an end of file: nothing is left to read.
            match self.pieces.recv_timeout(self.timeout) {
                Ok(piece) => self.rest = piece,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return Ok(0),
            }
        }
        let count = self.rest.as_slice().read(buffer)?;
        self.rest.drain(..count);
        Ok(count)
    }
}
