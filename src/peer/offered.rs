//! The life of an offer: peers may have an artifact as long as it is offered, and the directory says so.

use std::sync::Arc;

use super::directory::{self, Directory, Holding, Tier};
use super::offer::{Offer, Offers};
use super::protocol::State;

/// An artifact that peers may have, until this is dropped.
#[derive(Debug)]
pub struct Offered {
    offer: Arc<Offer>,
    offers: Arc<Offers>,
    directory: Arc<Directory>,
}

impl Offered {
    /// Lets peers have it, and lets them know.
    pub fn new(offer: Offer, offers: Arc<Offers>, directory: Arc<Directory>) -> Offered {
        let offer = Arc::new(offer);
        offers.insert(Arc::clone(&offer));
        let offered = Offered { offer, offers, directory };
        offered.announce();
        offered
    }

    /// The offer.
    pub fn offer(&self) -> &Arc<Offer> {
        &self.offer
    }

    /// All of it is there. False: it cannot be given on.
    pub fn complete(&self) -> bool {
        let complete = self.offer.complete();
        self.announce();
        complete
    }

    /// Takes it back, and waits until nobody uses its memory any more.
    pub async fn end(self) {
        let offer = Arc::clone(&self.offer);
        drop(self);
        offer.unused().await;
    }

    fn announce(&self) {
        let have = self.offer.have();
        let state = match have.state {
            State::None => return,
            State::Loading => directory::State::Loading,
            State::Complete => directory::State::Complete,
        };
        let (chunks, rank) = (have.chunks_ready, have.rank.started_ms);
        let holding = Holding { state, tier: Tier::Host, chunks, rank };
        let digest = self.offer.digest().to_string();
        if let Err(error) = self.directory.announce(&digest, holding) {
            tracing::warn!(digest, code = %error.code(), %error, "peers are not told of an artifact");
        }
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        self.directory.withdraw(&self.offer.digest().to_string());
        self.offers.withdraw(&self.offer);
    }
}
