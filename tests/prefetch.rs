//! The hint worker beside a sequential reader: whole clusters, and the next one before it is asked
//! for.

use crate::sim::{Lab, Rng, block_on, disk::Trace, format_options, open_options};
use std::ops::Range;
use ublk_integrity::{Device, HintReceiver, OpenOptions, RequestContext, create::FormatOptions, hints};

const CLUSTER: u64 = 16;
const TAGS_PER_PAGE: u64 = 128;

/// The tag pages that were read, of either slot or both.
fn tag_pages(lab: &Lab, trace: &[Trace]) -> Vec<u64> {
    let superblock = lab.superblock();
    let (first, end) = (superblock.slot_offset(0, 0, 0), superblock.slot_offset(1, 0, 0));
    let pages = |offset: u64, len: usize| (offset - first) / 8192..(offset - first + len as u64).div_ceil(8192);
    let mut found: Vec<u64> = trace
        .iter()
        .filter_map(|t| match t {
            Trace::Read { device: Device::Meta, offset, len } if (first..end).contains(offset) => {
                Some(pages(*offset, *len))
            }
            _ => None,
        })
        .flatten()
        .collect();
    found.sort_unstable();
    found
}

/// A full volume of four clusters, opened anew: nothing is cached.
fn cold(cache_bytes: u64) -> (Lab, HintReceiver) {
    let format = FormatOptions { size: Some(4 << 20), ..format_options(512) };
    let (sender, hints) = hints::channel(64);
    let options = OpenOptions { cache_bytes, hints: Some(sender), ..open_options(&mut Rng::new(1)) };
    let mut lab = Lab::new(&format, &options);
    (0..lab.volume.blocks()).step_by(256).for_each(|first| lab.write(first, 256, 1));
    lab.checkpoint();
    (lab.reopened().unwrap(), hints)
}

/// Follows all hints; returns the tag pages that this read.
fn follow(lab: &mut Lab, worker: &mut RequestContext, hints: &HintReceiver) -> Vec<u64> {
    let trace = lab.traced(|lab| {
        hints.try_iter().for_each(|hint| block_on(&lab.io, lab.volume.prefetch(&lab.io, worker, hint)));
    });
    tag_pages(lab, &trace)
}

/// More than all pages need.
const ALL: u64 = 1 << 20;
/// Two clusters and the tree above them: half of the pages.
const HALF: u64 = 40 << 12;

#[test]
fn a_sequential_cold_read_finds_its_tag_pages_there() {
    let (mut lab, hints) = cold(ALL);
    let mut worker = lab.volume.context(0);
    let pages = lab.volume.blocks() / TAGS_PER_PAGE;
    let cluster = |n: u64| -> Range<u64> { n * CLUSTER..(n + 1) * CLUSTER };
    for page in 0..pages {
        let trace = lab.traced(|lab| assert!(lab.range_reads_as(page * TAGS_PER_PAGE, TAGS_PER_PAGE, 1)));
        let (read, brought) = (tag_pages(&lab, &trace), follow(&mut lab, &mut worker, &hints));
        match page {
            0 => assert_eq!((read, brought), (vec![0], (1..CLUSTER).collect()), "the rest of its cluster"),
            1 => assert_eq!((read, brought), (vec![], cluster(1).collect()), "reads are running on"),
            _ => {
                assert_eq!(read, [], "page {page} was there");
                // At the first page of a cluster the next one is brought, and nothing twice.
                let next = page / CLUSTER + 1;
                let ahead = page % CLUSTER == 0 && next * CLUSTER < pages;
                assert_eq!(brought, if ahead { cluster(next).collect() } else { vec![] }, "page {page}");
            }
        }
    }
    let counters = lab.volume.status().counters;
    assert_eq!((counters.hints_used, counters.hints_dropped), (pages - 1, 0), "{counters:?}");
}

#[test]
fn a_hint_anywhere_brings_its_whole_cluster_and_no_other() {
    let (mut lab, hints) = cold(ALL);
    let mut worker = lab.volume.context(0);
    assert!(lab.reads_as(37 * TAGS_PER_PAGE, 1));
    let brought = follow(&mut lab, &mut worker, &hints);
    // A run that is read in pieces may cover a page that is there already.
    assert!((32..48).all(|page| page == 37 || brought.contains(&page)), "{brought:?}");
    assert!(brought.iter().all(|page| (32..48).contains(page)), "{brought:?}");
}

#[test]
fn where_not_all_fit_only_reads_that_run_on_bring_anything() {
    let (mut lab, hints) = cold(HALF);
    let mut worker = lab.volume.context(0);
    for page in [37, 3, 50, 11, 60, 23, 45, 19] {
        assert!(lab.reads_as(page * TAGS_PER_PAGE, 1));
        assert_eq!(follow(&mut lab, &mut worker, &hints), [], "page {page}: nobody knows what comes next");
    }
    let counters = lab.volume.status().counters;
    assert_eq!((counters.hints_sent, counters.hints_dropped), (0, 0), "{counters:?}");
    assert!(lab.reads_as(38 * TAGS_PER_PAGE, 1), "the page after the first");
    let brought = follow(&mut lab, &mut worker, &hints);
    assert!([32, 33, 46, 47].iter().all(|page| brought.contains(page)), "{brought:?}");
    for page in 39..43 {
        let trace = lab.traced(|lab| assert!(lab.range_reads_as(page * TAGS_PER_PAGE, TAGS_PER_PAGE, 1)));
        assert_eq!(tag_pages(&lab, &trace), [], "page {page} is there");
    }
}
