//! A TCP relay that can go deaf: for paths that die while the servers at both ends live.

use std::{net::Ipv4Addr, sync::Arc};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub struct Proxy {
    pub port: u16,
    generation: Arc<watch::Sender<u64>>,
    acceptor: JoinHandle<()>,
}

impl Proxy {
    /// Relays to a local port.
    pub async fn to(port: u16) -> Proxy {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let own_port = listener.local_addr().unwrap().port();
        let generation = Arc::new(watch::Sender::new(0));
        let current = generation.clone();
        let acceptor = tokio::spawn(async move {
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let far = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
                let ours = *current.borrow();
                tokio::spawn(relay(near, far, current.subscribe(), ours));
            }
        });
        Proxy { port: own_port, generation, acceptor }
    }

    /// The connections there are stay open but carry nothing any more; new ones work.
    pub fn deafen(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// New connections are refused from now on.
    pub async fn refuse(&mut self) {
        self.acceptor.abort();
        let _ = (&mut self.acceptor).await;
    }
}

async fn relay(mut near: TcpStream, mut far: TcpStream, mut generation: watch::Receiver<u64>, ours: u64) {
    let deafened = async {
        let _ = generation.wait_for(|now| *now != ours).await;
    };
    tokio::select! {
        () = deafened => {}
        _ = copy_bidirectional(&mut near, &mut far) => return,
    }
    // Deaf: both sockets stay open until the test ends.
    std::future::pending::<()>().await;
}
