//! Neither a client nor a server allocates anything for a request: both are in the way of a device
//! that may be short of memory.
#![allow(unsafe_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};
use ublk_anchor_protocol::{
    Backend, Body, Client, Error, Failure, Replaced, Retired, Server, Store, Text, Uuid, Volume,
};

/// Of all threads.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps `alloc`'s contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps `dealloc`'s contract, and `place` came from `System`.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A store of one body that is away at every seventh request.
struct Kept(u64, Body, u32);

impl Store for Kept {
    fn load(&mut self, _: &Volume) -> Result<Option<(u64, Body)>, Failure> {
        self.2 += 1;
        if self.2 % 7 == 0 {
            return Err(Failure::Away(Text::of(format_args!("away the {}th time", self.2 / 7))));
        }
        Ok(Some((self.0, self.1)))
    }
    fn replace(&mut self, _: &Volume, expected: u64, body: &Body) -> Result<Replaced, Failure> {
        if self.0 != expected {
            return Ok(Replaced::Conflict);
        }
        (self.0, self.1) = (expected + 1, *body);
        Ok(Replaced::Done)
    }
    fn init(&mut self, _: &Volume, _: u64, _: &Body) -> Result<Replaced, Failure> {
        Ok(Replaced::Conflict)
    }
    fn retire(&mut self, _: &Volume, _: u64) -> Result<Retired, Failure> {
        Err(Failure::Refused(Text::of("never")))
    }
}

#[test]
fn a_thousand_requests_of_every_kind_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent");
    let mut server = Server::listen(&path).unwrap();
    thread::spawn(move || server.serve(&mut Backend::Store(&mut Kept(0, Body([0; Body::BYTES]), 0))));
    let client = || Client::new(&path, Uuid([1; 16]), None, Duration::from_secs(30)).unwrap();
    let (mut client, mut others) = (client(), [client(), client()]);
    // Once it is away, which is told on standard error, and back.
    assert_eq!((0..8).filter(|_| client.load().is_err()).count(), 1);

    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let (mut away, mut generation) = (0, 0);
    for number in 0..1000_u32 {
        match client.load() {
            Ok(Some((found, _))) => assert_eq!(found, generation),
            Err(Error::Away(_)) => away += 1,
            other => panic!("{other:?}"),
        }
        assert_eq!(client.replace(generation, &Body([number as u8; Body::BYTES])), Ok(Replaced::Done));
        generation += 1;
        assert_eq!(client.replace(generation - 1, &Body([0; Body::BYTES])), Ok(Replaced::Conflict));
        assert!(matches!(client.read(), Err(Error::Refused(_))));
        // A new connection, as after a request that got no answer.
        if let Some(other) = others.get_mut(number as usize) {
            assert!(other.shape().is_ok());
        }
    }
    let allocated = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert!(away > 100 && allocated == 0, "{allocated} allocations, {away} times away");
}
