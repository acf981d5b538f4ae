//! Ways to use a disk: what a request is, and where the next one goes.

/// One way to use a disk.
pub struct Pattern {
    pub name: &'static str,
    pub act: Act,
    pub places: Places,
    /// Bytes of a request.
    pub request: usize,
    /// Requests under way.
    pub depth: usize,
}

/// What is done at a place.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    Read,
    Write,
    /// A write, then a flush (fsync).
    WriteFlush,
    /// A write that is durable when it is answered.
    WriteFua,
    /// A read at another place, a write, then a flush.
    ReadWriteFlush,
}

impl Act {
    /// Whether anything is written.
    pub fn writes(self) -> bool {
        self != Self::Read
    }

    /// Whether what was written is durable once the last request has been answered.
    pub fn is_durable(self) -> bool {
        matches!(self, Self::WriteFlush | Self::WriteFua | Self::ReadWriteFlush)
    }

    /// Of a turn: requests that read, requests that write.
    pub fn requests(self) -> (u64, u64) {
        match self {
            Self::Read => (1, 0),
            Self::Write | Self::WriteFlush | Self::WriteFua => (0, 1),
            Self::ReadWriteFlush => (1, 1),
        }
    }
}

/// Where requests go, one after the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Places {
    /// Each behind the one before.
    InOrder,
    /// Anywhere.
    Scattered,
    /// In order, each place twice: the tail of a log whose last page is written again.
    EachTwice,
    /// In order, each begins in the middle of the one before: a log that goes on within a page.
    HalfOver,
}

impl Places {
    /// The offset of the request of a turn in `size` bytes, which are whole requests.
    pub fn at(self, turn: u64, request: u64, size: u64) -> u64 {
        let places = size / request;
        match self {
            Self::InOrder => turn % places * request,
            Self::Scattered => scatter(turn) % places * request,
            Self::EachTwice => turn / 2 % places * request,
            Self::HalfOver => turn % (2 * places - 1) * (request / 2),
        }
    }
}

/// Spreads consecutive numbers over all of u64 (the finalizer of a 64-bit hash; no two collide).
pub fn scatter(n: u64) -> u64 {
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_what_their_names_say_and_lie_inside() {
        let of = |places: Places| (0..9).map(|turn| places.at(turn, 8, 32)).collect::<Vec<_>>();
        assert_eq!(of(Places::InOrder), [0, 8, 16, 24, 0, 8, 16, 24, 0]);
        assert_eq!(of(Places::EachTwice), [0, 0, 8, 8, 16, 16, 24, 24, 0]);
        assert_eq!(of(Places::HalfOver), [0, 4, 8, 12, 16, 20, 24, 0, 4]);
        assert!(of(Places::Scattered).iter().all(|at| at % 8 == 0 && *at < 32));
        assert_eq!(Places::HalfOver.at(5, 8, 8), 0, "one place alone");
    }
}
