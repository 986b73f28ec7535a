//! Compressed text: what an archive and sealed segments hold. Any `gunzip` reads it.

use flate2::{Compression, bufread::GzDecoder, write::GzEncoder};
use std::io::{Read, Write};

/// Why bytes cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum GzipError {
    /// They are not gzip, were cut off, or are not what was packed (gzip carries a checksum).
    #[error("not whole gzip: {0}")]
    Malformed(String),
    /// They would unpack to more than allowed. No more than that was unpacked.
    #[error("unpacks to more than {max} bytes")]
    TooLarge {
        /// The limit in bytes.
        max: usize,
    },
}

/// Packs bytes. The same bytes give the same result in the same version of this program: no time and no name is in it.
pub fn pack(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    // Writing into memory does not fail. If it did, nothing is no gzip, and whoever reads it back would see that.
    encoder.write_all(bytes).and_then(|()| encoder.finish()).unwrap_or_default()
}

/// Unpacks what [`pack`] made, if it is `bytes_max` bytes at most.
///
/// # Errors
/// The bytes are not gzip, damaged, followed by something else, or too large.
pub fn unpack(bytes: &[u8], bytes_max: usize) -> Result<Vec<u8>, GzipError> {
    let malformed = |e: std::io::Error| GzipError::Malformed(e.to_string());
    let mut decoder = GzDecoder::new(bytes);
    let mut plain = Vec::new();
    decoder.by_ref().take(bytes_max as u64).read_to_end(&mut plain).map_err(malformed)?;
    // The checksum is looked at only by the read that finds the end.
    if decoder.read(&mut [0]).map_err(malformed)? > 0 {
        return Err(GzipError::TooLarge { max: bytes_max });
    }
    match decoder.into_inner() {
        [] => Ok(plain),
        [..] => Err(GzipError::Malformed("something follows its end".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_packed_is_unpacked_and_the_same_bytes_pack_alike() {
        for bytes in [&b""[..], b"a", &[7; 100_000]] {
            assert_eq!(unpack(&pack(bytes), bytes.len()).unwrap(), bytes);
            assert_eq!(pack(bytes), pack(bytes));
        }
        assert!(pack(&[7; 100_000]).len() < 1_000);
    }

    #[test]
    fn a_bomb_is_unpacked_up_to_the_limit_only() {
        let bomb = pack(&vec![0; 10_000_000]);
        assert!(bomb.len() < 20_000, "{}", bomb.len());
        assert!(matches!(unpack(&bomb, 1_000), Err(GzipError::TooLarge { max: 1_000 })));
        assert!(matches!(unpack(&bomb, 9_999_999), Err(GzipError::TooLarge { .. })));
        assert_eq!(unpack(&bomb, 10_000_000).unwrap().len(), 10_000_000);
    }

    #[test]
    fn a_cut_or_a_tail_is_noticed() {
        let packed = pack(b"one line\n");
        for end in 0..packed.len() {
            assert!(unpack(&packed[..end], 100).is_err(), "cut at {end}");
        }
        let tail = [&packed[..], b"x"].concat();
        assert!(matches!(unpack(&tail, 100), Err(GzipError::Malformed(_))));
        assert!(matches!(unpack(&[&packed[..], &packed].concat(), 100), Err(GzipError::Malformed(_))));
    }
}
