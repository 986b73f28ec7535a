//! Frames and lines that are damaged, cut, or newer than this program.

#![allow(clippy::unwrap_used, clippy::panic)] // a failed step is a failed test

mod common;

use common::{at, baseline, big, decided, fact, stream};
use valkeeper_core::{
    event::{Event, Record},
    ids::{Seq, WriterEpoch},
};
use valkeeper_journal::{
    Hash, LineError, Problem, RecordError, Stored, decode, decode_stream, encode, export_line, import_line,
    import_lines, record::RECORD_BYTES_MAX, verify, verify_chain, verify_lines,
};

fn chain(events: Vec<Event>) -> Vec<Stored> {
    let mut prev = Hash::ZERO;
    let mut records = Vec::new();
    for (event, seq) in events.into_iter().zip(1..) {
        let record = Record { seq: Seq(seq), epoch: WriterEpoch(1), time: at(seq as i64), event };
        let stored = Stored::seal(record, prev).unwrap();
        prev = stored.hash;
        records.push(stored);
    }
    records
}

fn sample() -> Vec<Stored> {
    let started = Event::EpochStarted {
        writer: "valkeeper-0".to_owned(),
        version: "0.1.0".to_owned(),
        lost_through: None,
    };
    chain(vec![baseline(&stream()), started, fact(1), decided()])
}

fn frames(records: &[Stored]) -> Vec<u8> {
    records.iter().flat_map(encode).collect()
}

fn lines(records: &[Stored]) -> String {
    records.iter().map(|s| export_line(s) + "\n").collect()
}

#[test]
fn a_cut_at_any_byte_gives_every_whole_record_and_then_torn() {
    let records = sample();
    let bytes = frames(&records);
    let mut ends = vec![0];
    for record in &records {
        ends.push(ends.last().unwrap() + encode(record).len());
    }
    for cut in 0..bytes.len() {
        let items: Vec<_> = decode_stream(&bytes[..cut]).collect();
        let whole = ends.iter().filter(|end| **end <= cut).count() - 1;
        assert!(items.iter().take(whole).zip(&records).all(|(item, record)| item.as_ref() == Ok(record)));
        if ends.contains(&cut) {
            assert_eq!(items.len(), whole);
        } else {
            assert_eq!(items.len(), whole + 1);
            assert!(
                matches!(items[whole], Err(RecordError::Torn { .. })),
                "cut at {cut}: {:?}",
                items[whole]
            );
        }
    }
}

#[test]
fn a_tail_of_zeros_is_torn_and_a_tail_of_garbage_is_corrupt() {
    let mut bytes = frames(&sample());
    let length = bytes.len();
    bytes.resize(length + 4096, 0);
    let last = decode_stream(&bytes).last().unwrap();
    assert!(matches!(last, Err(RecordError::Torn { .. })), "{last:?}");
    bytes.truncate(length);
    bytes.extend([0xa5; 100]);
    let last = decode_stream(&bytes).last().unwrap();
    assert!(matches!(last, Err(RecordError::Corrupt(_))), "{last:?}");
}

#[test]
fn a_flip_of_any_bit_of_a_frame_is_corruption() {
    let records = sample();
    let bytes = frames(&records);
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let items: Vec<_> = decode_stream(&flipped).collect();
        let last = items.last().unwrap();
        assert!(matches!(last, Err(RecordError::Corrupt(_))), "bit {bit}: {last:?}");
        assert!(
            items.iter().zip(&records).all(|(item, record)| item.is_err() || item.as_ref() == Ok(record))
        );
    }
}

/// Changes a frame and makes its checksums right again: what a forger or another program writes.
fn forged(stored: &Stored, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut body = encode(stored).split_off(12);
    change(&mut body);
    let length = (body.len() as u32).to_le_bytes();
    let mut frame = length.to_vec();
    frame.extend(crc32c::crc32c(&length).to_le_bytes());
    frame.extend(crc32c::crc32c(&body).to_le_bytes());
    frame.extend(body);
    frame
}

#[test]
fn a_frame_with_right_checksums_and_other_content_breaks_the_chain() {
    let records = sample();
    let length = encode(&records[2]).len() - 12;
    for position in 0..length {
        let bytes = forged(&records[2], |body| body[position] ^= 1);
        // Either it is no record any more, or the chain says so.
        if let Ok(changed) = decode(&bytes) {
            let mut tampered = records.clone();
            tampered[2] = changed;
            assert!(verify_chain(None, &tampered).is_err(), "byte {position} was changed unnoticed");
        }
    }
}

#[test]
fn newer_codecs_kinds_and_schemas_are_refused_by_their_number() {
    let stored = &sample()[2];
    let codec = decode(&forged(stored, |body| body[0] = 9)).unwrap_err();
    assert!(matches!(codec, RecordError::UnknownCodec { codec: 9, .. }), "{codec}");
    let kind = decode(&forged(stored, |body| body[1..3].copy_from_slice(&512u16.to_le_bytes()))).unwrap_err();
    assert_eq!(kind, RecordError::UnknownKind { seq: Seq(3), kind: 512 });
    assert!(kind.to_string().contains("512"));
    let schema = decode(&forged(stored, |body| body[3] = 7)).unwrap_err();
    assert_eq!(schema, RecordError::UnknownSchema { seq: Seq(3), kind: 4, schema: 7, known: 1 });
    let line = export_line(stored);
    assert!(matches!(
        import_line(&line.replace("\"kind\":4", "\"kind\":99")),
        Err(RecordError::UnknownKind { .. })
    ));
    let newer = import_line(&line.replace("\"schema\":1", "\"schema\":2"));
    assert!(matches!(newer, Err(RecordError::UnknownSchema { schema: 2, .. })), "{newer:?}");
    let other = import_line(&line.replace("\"kind\":4", "\"kind\":5")).unwrap_err();
    assert!(other.to_string().contains("payload is kind 4"), "{other}");
}

#[test]
fn lengths_from_a_damaged_disk_are_never_believed() {
    for length in [0u32, 1, 100, RECORD_BYTES_MAX as u32 + 1, u32::MAX] {
        let length = length.to_le_bytes();
        let mut frame = length.to_vec();
        frame.extend(crc32c::crc32c(&length).to_le_bytes());
        frame.extend([0; 4]);
        assert!(matches!(decode_stream(&frame).next(), Some(Err(RecordError::Corrupt(_)))));
    }
    // The payload's length within the envelope, under right checksums: bincode must not allocate it.
    let huge = forged(&sample()[2], |body| body[61..69].copy_from_slice(&(1u64 << 40).to_le_bytes()));
    assert!(matches!(decode(&huge), Err(RecordError::Corrupt(_))));
}

#[test]
fn a_record_over_the_limit_is_not_sealed() {
    let record = Record { seq: Seq(1), epoch: WriterEpoch(1), time: at(1), event: big(RECORD_BYTES_MAX) };
    assert!(matches!(Stored::seal(record, Hash::ZERO), Err(RecordError::TooLarge { .. })));
}

#[test]
fn a_line_says_what_it_holds() {
    let records = sample();
    let line: serde_json::Value = serde_json::from_str(&export_line(&records[2])).unwrap();
    let keys: Vec<_> = line.as_object().unwrap().keys().map(String::as_str).collect();
    let mut expected = ["seq", "epoch", "time", "kind", "schema", "prev", "hash", "event"];
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!(line["event"]["PodChanged"]["member"], "0-1");
    assert_eq!(line["prev"], records[1].hash.to_string());
    assert_eq!(line["time"], 3_000_000_000i64);
}

#[test]
fn what_an_older_program_wrote_keeps_its_bytes_and_its_hash() {
    // Another field order and spacing than this program writes, and a field that it does not know.
    let payload = r#"{"PodChanged":{ "pod":"Absent", "later":1, "member":"0-1" }}"#;
    let template = export_line(&sample()[2]);
    let event = template.find("\"event\":").unwrap() + "\"event\":".len();
    let line = format!("{}{payload}}}", &template[..event]);
    let mut stored = import_line(&line).unwrap();
    assert_eq!(stored.record.event, fact(1));
    assert_eq!(stored.payload(), payload.as_bytes());
    stored.hash = stored.computed_hash();
    assert_ne!(stored.hash, sample()[2].hash);
    assert_eq!(decode(&encode(&stored)).unwrap(), stored);
    assert_eq!(import_line(&export_line(&stored)).unwrap(), stored);
}

#[test]
fn a_change_of_any_byte_of_an_export_is_noticed() {
    let records = sample();
    let text = lines(&records);
    assert!(verify_lines(text.as_bytes()).is_intact());
    for position in 0..text.len() {
        let mut bytes = text.clone().into_bytes();
        bytes[position] ^= 1;
        let report = verify_lines(&bytes[..]);
        // The last newline may go: the record before it is whole.
        let harmless = report.records == records.len() && report.head == Some(records[3].head());
        assert!(!report.is_intact() || (harmless && position + 1 == text.len()), "byte {position}");
    }
}

#[test]
fn an_export_cut_at_any_byte_is_torn_or_shorter() {
    let records = sample();
    let text = lines(&records);
    for cut in 0..text.len() {
        let items: Vec<_> = import_lines(&text.as_bytes()[..cut]).collect();
        for (item, record) in items.iter().zip(&records) {
            match item {
                Ok(stored) => assert_eq!(stored, record),
                Err(LineError::Record { line, why: RecordError::Torn { .. } }) => {
                    assert_eq!(*line, items.len())
                }
                Err(other) => panic!("cut at {cut}: {other:?}"),
            }
        }
    }
}

#[test]
fn an_endless_line_is_refused_without_reading_it_all() {
    let endless = std::io::BufReader::new(std::io::repeat(b'['));
    let mut lines = import_lines(endless);
    let item = lines.next();
    assert!(matches!(item, Some(Err(LineError::Record { line: 1, why: RecordError::TooLarge { .. } }))));
    assert!(lines.next().is_none());
}

#[test]
fn every_way_to_bend_a_stream_has_its_problem() {
    let records = sample();
    let problems = |bent: &[Stored]| verify(None, bent).problems;
    assert_eq!(problems(&records), []);
    let missing = problems(&records[1..]);
    assert!(matches!(
        missing[..],
        [Problem::Baseline { .. }, Problem::BeginningMissing { first: Seq(2) }, ..]
    ));
    let gap = problems(&[records[0].clone(), records[1].clone(), records[3].clone()]);
    assert_eq!(gap, [Problem::Gap { after: Seq(2), found: Seq(4) }]);
    let doubled = problems(&[records[0].clone(), records[1].clone(), records[1].clone()]);
    assert!(matches!(doubled[0], Problem::Gap { after: Seq(2), found: Seq(2) }));
    let mut swapped = records.clone();
    swapped.swap(2, 3);
    assert!(matches!(problems(&swapped)[0], Problem::Gap { after: Seq(2), found: Seq(4) }));
    let mut other = records.clone();
    other[2] = chain(vec![baseline(&stream()), fact(7), fact(8)])[2].clone();
    let found = problems(&other);
    assert!(matches!(
        found[..],
        [Problem::PrevMismatch { seq: Seq(3), .. }, Problem::PrevMismatch { seq: Seq(4), .. }]
    ));
}

#[test]
fn epochs_rise_at_a_claim_and_nowhere_else_and_time_never_falls() {
    let started = Event::EpochStarted { writer: "w".to_owned(), version: "v".to_owned(), lost_through: None };
    let cases =
        [(2, fact(1), 300, "epoch"), (3, started.clone(), 300, ""), (1, started.clone(), 300, "epoch")];
    let rest = [(2, started, 300, ""), (1, fact(1), 300, ""), (1, fact(1), 0, "older")];
    for (epoch, event, seconds, says) in cases.into_iter().chain(rest) {
        let mut records = sample();
        let record = Record { seq: Seq(5), epoch: WriterEpoch(epoch), time: at(seconds), event };
        records.push(Stored::seal(record, records[3].hash).unwrap());
        let problems: Vec<String> = verify(None, &records).problems.iter().map(Problem::to_string).collect();
        assert_eq!(problems.len(), usize::from(!says.is_empty()), "{problems:?}");
        assert!(problems.iter().all(|p| p.contains(says)), "{problems:?}");
    }
}

#[test]
fn the_layout_is_the_documented_one() {
    // Its own chain: what other events look like as JSON is not pinned here.
    let record = Record { seq: Seq(3), epoch: WriterEpoch(1), time: at(3), event: fact(1) };
    let stored = &Stored::seal(record, Hash([0xc3; 32])).unwrap();
    let frame = encode(stored);
    let number = |from: usize, bytes: usize| {
        frame[from..from + bytes].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    assert_eq!(number(0, 4) as usize, frame.len() - 12);
    assert_eq!((number(12, 1), number(13, 2), number(15, 2)), (1, 4, 1));
    assert_eq!((number(17, 8), number(25, 8), number(33, 8)), (3, 1, 3_000_000_000));
    assert_eq!(frame[41..73], stored.prev.0);
    let payload = number(73, 8) as usize;
    assert_eq!(&frame[81..81 + payload], br#"{"PodChanged":{"member":"0-1","pod":"Absent"}}"#);
    assert_eq!(frame[81 + payload..], stored.hash.0);
    // Pinned: a change of any byte of the layout, or of what the hash covers, is a new codec.
    assert_eq!(stored.hash.to_string(), "e1f4055eee5bd6317eca43a2dd3eb5ceeaf893a9d941a73160884431171adf0c");
}
