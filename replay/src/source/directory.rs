//! tmp
use super::Stream;
use crate::Error;
use std::path::Path;
/// tmp
pub(super) fn load(path: &Path) -> Result<Vec<Stream>, Error> {
    Err(Error::Empty { path: path.to_owned() })
}
