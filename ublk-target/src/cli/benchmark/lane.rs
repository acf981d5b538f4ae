//! What a request under way owns.

use ublk_integrity::{Buf, RequestContext, Volume};

/// What one of the requests under way owns.
pub struct Lane {
    pub context: Option<RequestContext>,
    pub buf: Buf,
}

impl Lane {
    /// # Panics
    /// Where it was not made for a volume.
    pub fn context(&mut self) -> &mut RequestContext {
        self.context.as_mut().expect("this lane was made for the volume")
    }

    pub fn take_buf(&mut self) -> Buf {
        std::mem::replace(&mut self.buf, Buf::none())
    }
}

/// So many lanes, of requests of up to `largest` bytes.
pub fn lanes(volume: Option<&Volume>, count: usize, largest: usize) -> Vec<Lane> {
    let lane = |mut buf: Buf| {
        buf.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8 + 1);
        Lane { context: volume.map(|v| v.context(0)), buf }
    };
    Buf::several(count, largest).into_iter().map(lane).collect()
}
