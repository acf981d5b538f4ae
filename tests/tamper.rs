//! Everything on the medium changed, one thing at a time: EILSEQ or a refused open, or the right
//! bytes where a second copy rightly heals it; never wrong bytes.

mod log;

use crate::sim::{
    Lab, Rng, SimStorage, format_options,
    image::{self, PAGE, SUPERBLOCK_BYTES, SUPERBLOCKS, Superblock},
    lab::content,
    open_options,
};
use sha2::{Digest, Sha256};
use ublk_integrity::{Access, Device, Errno, OpenOptions, TagAlgorithm, create::FormatOptions, open::OpenError};

/// Nothing is cached: every read looks at the medium.
fn options() -> OpenOptions {
    OpenOptions { cache_bytes: 0, ..open_options(&mut Rng::new(1)) }
}

/// 80 tag pages, so that there are three levels with two pages in the middle one.
fn deep() -> FormatOptions {
    FormatOptions { size: Some(5 << 20), ..format_options(512) }
}

/// Blocks of three tag pages; the last hangs on the second page of level 1.
const PLACES: [u64; 3] = [0, 128, 64 * 128 + 5];

/// A block written once, before all the others' versions: no later log entry speaks of it.
const QUIET: u64 = 20;

/// A volume whose blocks at `places` went through versions 1, 2 and 3, each checkpointed.
fn aged(format: &FormatOptions, places: &[u64]) -> (Lab, Vec<Moment>) {
    let mut lab = Lab::new(format, &options());
    lab.write(QUIET, 1, 1);
    let moments = (1..=3).map(|version| {
        places.iter().for_each(|block| lab.write(*block, 4, version));
        lab.checkpoint();
        Moment::of(&lab)
    });
    let moments = moments.collect();
    (lab, moments)
}

/// Things that lay on the medium at some moment: place and bytes.
struct Moment {
    superblocks: Vec<(u64, Vec<u8>)>,
    pages: Vec<(image::Page, Vec<u8>)>,
    blocks: Vec<(u64, Vec<u8>)>,
}

impl Moment {
    fn of(lab: &Lab) -> Self {
        let (superblock, bs) = (lab.superblock(), lab.block_size());
        let pages = superblock.pages(&lab.disk());
        let meta = |at: u64| lab.peek(Device::Meta, at, PAGE as usize);
        let block = |b: &u64| (superblock.block_offset(*b), lab.peek(Device::Data, superblock.block_offset(*b), bs));
        Self {
            superblocks: SUPERBLOCKS.iter().map(|at| (*at, meta(*at))).collect(),
            pages: pages.iter().map(|p| (*p, meta(p.offset))).collect(),
            blocks: PLACES.iter().map(block).collect(),
        }
    }
}

fn detected(lab: &mut Lab, block: u64) -> bool {
    matches!(lab.read(block), Err(e) if e.errno() == Errno::EILSEQ)
}

/// The medium as it is, opened and read by a new daemon that may write: refused, EILSEQ, or right.
/// Returns whether the tampering was noticed.
fn noticed_after_open(lab: &Lab, version: u64) -> bool {
    let fork = SimStorage::new(lab.disk().fork(7));
    let Ok(mut opened) = Lab::open(fork, &options()) else { return true };
    let mut noticed = false;
    // The second time after another open: what recovery has written down is judged too.
    for _ in 0..2 {
        for (block, version) in PLACES.map(|block| (block, version)).into_iter().chain([(QUIET, 1)]) {
            match opened.read(block) {
                Ok(bytes) => assert!(bytes == content(bytes.len(), block, version), "wrong bytes in block {block}"),
                Err(e) => {
                    assert_eq!(e.errno(), Errno::EILSEQ, "block {block}");
                    noticed = true;
                }
            }
        }
        opened = opened.reopened().expect("what was opened once opens again");
    }
    noticed
}

/// Every block that [`aged`] has written, and the version that it holds.
fn written() -> impl Iterator<Item = (u64, u64)> {
    PLACES.into_iter().flat_map(|first| (first..first + 4).map(|block| (block, 3))).chain([(QUIET, 1)])
}

#[test]
fn every_bit_of_every_current_page() {
    let (mut lab, _) = aged(&deep(), &PLACES);
    let pages = lab.superblock().pages(&lab.disk());
    assert_eq!(pages.len(), 3 + 2 + 1);
    for page in &pages {
        let good = lab.peek(Device::Meta, page.offset, PAGE as usize);
        // A block elsewhere, where there is one: all hang on the root.
        let under = block_under(page);
        let other = *PLACES.iter().rev().find(|b| (**b / 128) >> (6 * page.level) != page.index).unwrap_or(&under);
        for bit in 0..good.len() * 8 {
            // One sector is enough to write, and ten times faster than the page.
            let (byte, sector) = (bit / 8, bit / 8 / 512 * 512);
            let mut bad = good[sector..sector + 512].to_vec();
            bad[byte - sector] ^= 1 << (bit % 8);
            lab.with_poked(Device::Meta, page.offset + sector as u64, &bad, |lab| {
                assert!(detected(lab, under), "{page:?}, bit {bit}");
                if other != under && bit % 64 == 0 {
                    assert!(lab.reads_as(other, 3), "{page:?}, bit {bit}: block {other} suffers");
                }
            });
        }
    }
    assert!(written().all(|(block, version)| lab.reads_as(block, version)), "all flips were taken back");
}

#[test]
fn every_bit_of_every_block() {
    TagAlgorithm::ALL.into_iter().for_each(every_bit_of_every_block_with);
}

fn every_bit_of_every_block_with(tag: TagAlgorithm) {
    let (mut lab, _) = aged(&FormatOptions { tag, ..deep() }, &PLACES);
    let blocks: Vec<_> = written().collect();
    for (i, (block, _)) in blocks.iter().enumerate() {
        let at = lab.block_offset(*block);
        let good = lab.peek(Device::Data, at, 512);
        // Blocks beside it, or of other tag pages.
        let others = [blocks[(i + 1) % blocks.len()], blocks[(i + 7) % blocks.len()]];
        for bit in 0..512 * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            lab.with_poked(Device::Data, at, &bad, |lab| {
                assert!(detected(lab, *block), "block {block}, bit {bit}");
                assert!(others.iter().all(|(b, v)| lab.reads_as(*b, *v)), "block {block}, bit {bit}: another suffers");
            });
        }
    }
}

/// Opens read-only (so that the medium stays as it is) and reads a block that holds version 3.
fn open_and_read(lab: &Lab) -> Result<(), OpenError> {
    let read_only = OpenOptions { access: Access::ReadOnly, ..options() };
    let mut opened = Lab::open(lab.io.clone(), &read_only)?;
    assert!(opened.reads_as(PLACES[0], 3), "an open that succeeds reads what was written");
    Ok(())
}

/// Changes one bit of the copies at `places`; `resum`: as an adversary would, who makes the
/// checksum fit.
fn flip_superblock(lab: &mut Lab, places: &[u64], bit: usize, resum: bool) -> Result<(), OpenError> {
    let old: Vec<_> = places.iter().map(|at| lab.peek(Device::Meta, *at, SUPERBLOCK_BYTES)).collect();
    for (at, good) in places.iter().zip(&old) {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        if resum {
            let sum = Sha256::digest(&bad[..448]);
            bad[448..480].copy_from_slice(&sum);
        }
        lab.poke(Device::Meta, *at, &bad);
    }
    let result = open_and_read(lab);
    places.iter().zip(&old).for_each(|(at, good)| lab.poke(Device::Meta, *at, good));
    result
}

#[test]
fn every_bit_of_the_superblock() {
    let (mut lab, _) = aged(&format_options(4096), &[0, 128]);
    let [a, b] = SUPERBLOCKS;
    for bit in 0..SUPERBLOCK_BYTES * 8 {
        for one in [[a], [b]] {
            let opened = flip_superblock(&mut lab, &one, bit, false);
            // A copy whose checksum fails is passed over; one whose MAC alone fails was tampered
            // with.
            assert_eq!(opened.is_err(), bit / 8 >= 480, "bit {bit} of the copy at {one:?}: {opened:?}");
        }
        assert!(flip_superblock(&mut lab, &[a, b], bit, false).is_err(), "bit {bit} of both copies");
        if bit / 8 < 448 {
            assert!(flip_superblock(&mut lab, &[a, b], bit, true).is_err(), "bit {bit} of both copies, with checksums");
        }
    }
    open_and_read(&lab).expect("all flips were taken back");
}

#[test]
fn every_swap_of_two_blocks() {
    TagAlgorithm::ALL.into_iter().for_each(every_swap_of_two_blocks_with);
}

fn every_swap_of_two_blocks_with(tag: TagAlgorithm) {
    let format = FormatOptions { tag, ..format_options(512) };
    let mut lab = Lab::new(&format, &OpenOptions { cache_bytes: 1 << 20, ..options() });
    const BLOCKS: u64 = 130;
    lab.write(0, BLOCKS, 1);
    lab.checkpoint();
    let at = |b: u64| lab.superblock().block_offset(b);
    let places: Vec<_> = (0..BLOCKS).map(at).collect();
    let good: Vec<_> = (0..BLOCKS).map(|b| lab.peek(Device::Data, places[b as usize], 512)).collect();
    for i in 0..BLOCKS as usize {
        for j in i + 1..BLOCKS as usize {
            lab.poke(Device::Data, places[i], &good[j]);
            lab.poke(Device::Data, places[j], &good[i]);
            assert!(detected(&mut lab, i as u64) && detected(&mut lab, j as u64), "blocks {i} and {j}");
            lab.poke(Device::Data, places[i], &good[i]);
            lab.poke(Device::Data, places[j], &good[j]);
        }
    }
    // A block that was never written reads as zeros whatever lies there.
    lab.with_poked(Device::Data, places[129] + 512, &good[129], |lab| assert!(lab.reads_as(130, 0)));
}

#[test]
fn every_swap_of_two_tags() {
    TagAlgorithm::ALL.into_iter().for_each(every_swap_of_two_tags_with);
}

fn every_swap_of_two_tags_with(tag: TagAlgorithm) {
    let (mut lab, _) = aged(&FormatOptions { tag, ..deep() }, &[]);
    lab.write(0, 256, 1);
    lab.checkpoint();
    let pages = lab.superblock().pages(&lab.disk());
    let place = |tag: u64| {
        let page = pages.iter().find(|p| (p.level, p.index) == (0, tag / 128)).unwrap();
        page.offset + tag % 128 * image::TAG_BYTES
    };
    let good: Vec<_> = (0..256).map(|tag| lab.peek(Device::Meta, place(tag), 32)).collect();
    for i in 0..256 {
        for j in i + 1..256 {
            lab.poke(Device::Meta, place(i), &good[j as usize]);
            lab.poke(Device::Meta, place(j), &good[i as usize]);
            assert!(detected(&mut lab, i) && detected(&mut lab, j), "tags {i} and {j}");
            lab.poke(Device::Meta, place(i), &good[i as usize]);
            lab.poke(Device::Meta, place(j), &good[j as usize]);
        }
    }
    assert!(lab.reads_as(0, 1) && lab.reads_as(255, 1));
}

/// A block under a page, of those that were written.
fn block_under(page: &image::Page) -> u64 {
    let under = |block: &&u64| (**block / 128) >> (6 * page.level) == page.index;
    *PLACES.iter().find(under).expect("pages exist only where something was written")
}

#[test]
fn every_swap_of_two_pages() {
    let (mut lab, _) = aged(&deep(), &PLACES);
    let pages = lab.superblock().pages(&lab.disk());
    assert_eq!(pages.len(), 3 + 2 + 1);
    let good: Vec<_> = pages.iter().map(|p| lab.peek(Device::Meta, p.offset, PAGE as usize)).collect();
    for (i, a) in pages.iter().enumerate() {
        for (j, b) in pages.iter().enumerate().skip(i + 1) {
            lab.poke(Device::Meta, a.offset, &good[j]);
            lab.poke(Device::Meta, b.offset, &good[i]);
            assert!(detected(&mut lab, block_under(a)) && detected(&mut lab, block_under(b)), "{a:?} and {b:?}");
            assert!(noticed_after_open(&lab, 3), "{a:?} and {b:?}, opened");
            lab.poke(Device::Meta, a.offset, &good[i]);
            lab.poke(Device::Meta, b.offset, &good[j]);
        }
        // And with what lies in its own other slot.
        let other = lab.superblock().slot_offset(a.level, a.index, 1 - a.slot);
        let old = lab.peek(Device::Meta, other, PAGE as usize);
        assert!(lab.with_poked(Device::Meta, a.offset, &old, |lab| detected(lab, block_under(a))), "slots of {a:?}");
    }
    assert!(!noticed_after_open(&lab, 3), "all swaps were taken back");
}

#[test]
fn old_blocks_and_pages_beside_newer_metadata() {
    let (mut lab, moments) = aged(&deep(), &PLACES);
    let now = lab.superblock().pages(&lab.disk());
    for old in &moments[..2] {
        for (block, (at, bytes)) in PLACES.iter().zip(&old.blocks) {
            lab.with_poked(Device::Data, *at, bytes, |lab| {
                assert!(detected(lab, *block) && noticed_after_open(lab, 3), "block {block} alone");
                // With the tag page that vouched for it, where the tree looks for one today.
                let page = now.iter().find(|p| (p.level, p.index) == (0, block / 128)).unwrap();
                let (_, tags) = old.pages.iter().find(|(p, _)| (p.level, p.index) == (0, block / 128)).unwrap();
                lab.with_poked(Device::Meta, page.offset, tags, |lab| {
                    assert!(detected(lab, *block) && noticed_after_open(lab, 3), "block {block} and its tag page");
                });
            });
        }
        for (page, bytes) in &old.pages {
            let current = now.iter().find(|p| (p.level, p.index) == (page.level, page.index)).unwrap();
            lab.with_poked(Device::Meta, current.offset, bytes, |lab| {
                assert!(detected(lab, block_under(page)) && noticed_after_open(lab, 3), "{page:?}");
            });
        }
    }
}

#[test]
fn old_superblocks() {
    let (lab, moments) = aged(&deep(), &PLACES);
    let now = Moment::of(&lab);
    for (age, old) in moments[..2].iter().enumerate() {
        for copies in [&[0][..], &[1], &[0, 1]] {
            copies.iter().for_each(|i| lab.poke(Device::Meta, old.superblocks[*i].0, &old.superblocks[*i].1));
            let noticed = noticed_after_open(&lab, 3);
            // One old copy is passed over. Two of the checkpoint before: the log still leads to
            // today, as after a crash just before the superblock. Two older ones: their pages have
            // been written again.
            assert_eq!(noticed, age == 0 && copies.len() == 2, "copies {copies:?} of moment {age}");
            copies.iter().for_each(|i| lab.poke(Device::Meta, now.superblocks[*i].0, &now.superblocks[*i].1));
        }
    }
}

#[test]
fn every_bit_of_the_identity_block_and_a_foreign_one() {
    let format = FormatOptions { separate_meta: true, ..format_options(4096) };
    let opening = OpenOptions { separate_meta: true, ..options() };
    let mut lab = Lab::new(&format, &opening);
    let other = Lab::new(&FormatOptions { uuid: [10; 16], ..format }, &opening);
    let good = lab.peek(Device::Data, 0, SUPERBLOCK_BYTES);
    let opens = |lab: &mut Lab, bytes: &[u8]| {
        lab.with_poked(Device::Data, 0, bytes, |lab| Lab::open(lab.io.clone(), &opening).map(|_| ()))
    };
    for bit in 0..SUPERBLOCK_BYTES * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let opened = opens(&mut lab, &bad);
        assert!(matches!(opened, Err(OpenError::Foreign(_) | OpenError::Tampered { .. })), "bit {bit}: {opened:?}");
    }
    let foreign = other.peek(Device::Data, 0, SUPERBLOCK_BYTES);
    assert!(matches!(opens(&mut lab, &foreign), Err(OpenError::Foreign(_))));
    opens(&mut lab, &good).expect("its own");
    assert_eq!(Superblock::newest(&lab.disk()).uuid, [9; 16]);
}
