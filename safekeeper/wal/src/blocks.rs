//! What stands in a record's body, up to where its resource manager alone knows: which blocks it
//! changed, and which of its bytes are images of pages.
//!
//! ```text
//!   header (24)   block headers ─ main data header │ images and data of blocks ─ main data
//!                 └───────── what is read here ────┘
//!
//!   block header   1 id (0..=32)  1 fork and flags  2 bytes of data
//!                  with an image: 2 its bytes  2 hole offset  1 flags  (2 hole length: hole and compressed)
//!                  not SAME_REL:  4 tablespace  4 database  4 relation
//!                  4 block number
//!   others         255: 1 length of main data   254: 4 length   253: 2 origin   252: 4 top-level xid
//! ```
//!
//! All in the byte order of x86, as written by servers of 15 to 18 on little-endian machines.
//! (`access/xlogrecord.h`; `DecodeXLogRecord` in `xlogreader.c`)

use crate::bytes::{u16_at, u32_at};

/// Highest block id (`XLR_MAX_BLOCK_ID`).
const BLOCK_ID_MAX: u8 = 32;
const ID_DATA_SHORT: u8 = 255;
const ID_DATA_LONG: u8 = 254;
const ID_ORIGIN: u8 = 253;
const ID_TOPLEVEL_XID: u8 = 252;

/// In a block's flags (`BKPBLOCK_*`).
const FORK_MASK: u8 = 0x0F;
const HAS_IMAGE: u8 = 0x10;
const SAME_REL: u8 = 0x80;

/// In an image's flags (`BKPIMAGE_*`): a hole of zeros was left out, the image is to be restored, and
/// three ways of compression.
const IMAGE_HAS_HOLE: u8 = 0x01;
const IMAGE_APPLY: u8 = 0x02;
const IMAGE_COMPRESSED: u8 = 0x04 | 0x08 | 0x10;

/// A file of a table or an index (`RelFileLocator`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Relation {
    pub tablespace: u32,
    pub database: u32,
    pub number: u32,
}

/// Which part of a relation a block is in (`ForkNumber`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    Main,
    FreeSpaceMap,
    VisibilityMap,
    Init,
}

impl Fork {
    /// As the server prints it (`forkNames`).
    pub fn name(self) -> &'static str {
        match self {
            Fork::Main => "main",
            Fork::FreeSpaceMap => "fsm",
            Fork::VisibilityMap => "vm",
            Fork::Init => "init",
        }
    }
}

/// The picture of a whole page that a record carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Bytes in the record.
    pub len: u16,
    /// It is put in the page's place at replay; else it is there to be compared only.
    pub is_restored: bool,
}

/// A block that a record changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockRef {
    pub id: u8,
    pub relation: Relation,
    pub fork: Fork,
    pub block: u32,
    pub image: Option<Image>,
}

/// Bytes whose checksum is right and that no server writes all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid {what} at byte {offset} of the record's body")]
pub struct InvalidBody {
    pub what: &'static str,
    pub offset: usize,
}

/// The blocks that a record with this body changed; empty for one that changed none.
pub fn block_refs(body: &[u8]) -> Result<Vec<BlockRef>, InvalidBody> {
    let mut headers = Headers { body, offset: 0 };
    let mut blocks = Vec::new();
    let mut relation = None;
    // Of the bytes behind the headers so many are accounted for: the headers end where they begin.
    let mut data_len = 0;
    while body.len() - headers.offset > data_len {
        match headers.u8("block id")? {
            ID_DATA_SHORT => {
                data_len += usize::from(headers.u8("length of main data")?);
                break;
            }
            ID_DATA_LONG => {
                let len = headers.u32("length of main data")?;
                data_len = usize::try_from(len)
                    .ok()
                    .and_then(|len| data_len.checked_add(len))
                    .ok_or_else(|| headers.invalid("length of main data"))?;
                break;
            }
            ID_ORIGIN => _ = headers.u16("origin")?,
            ID_TOPLEVEL_XID => _ = headers.u32("top-level transaction")?,
            id if id <= BLOCK_ID_MAX
                && blocks.last().is_none_or(|last: &BlockRef| id > last.id) =>
            {
                let (block, len) = headers.block(id, &mut relation)?;
                blocks.push(block);
                data_len += len;
            }
            _ => return Err(headers.invalid("block id")),
        }
    }
    if body.len() - headers.offset != data_len {
        return Err(headers.invalid("length of data"));
    }
    Ok(blocks)
}

struct Headers<'a> {
    body: &'a [u8],
    offset: usize,
}

impl Headers<'_> {
    /// The block behind its id, and the bytes of its image and data.
    fn block(
        &mut self,
        id: u8,
        relation: &mut Option<Relation>,
    ) -> Result<(BlockRef, usize), InvalidBody> {
        let flags = self.u8("flags of a block")?;
        let fork = match flags & FORK_MASK {
            0 => Fork::Main,
            1 => Fork::FreeSpaceMap,
            2 => Fork::VisibilityMap,
            3 => Fork::Init,
            _ => return Err(self.invalid("fork")),
        };
        let mut len = usize::from(self.u16("length of a block's data")?);
        let mut image = None;
        if flags & HAS_IMAGE != 0 {
            let image_len = self.u16("length of an image")?;
            self.u16("hole of an image")?;
            let image_flags = self.u8("flags of an image")?;
            if image_flags & IMAGE_HAS_HOLE != 0 && image_flags & IMAGE_COMPRESSED != 0 {
                self.u16("hole of an image")?;
            }
            len += usize::from(image_len);
            image = Some(Image {
                len: image_len,
                is_restored: image_flags & IMAGE_APPLY != 0,
            });
        }
        if flags & SAME_REL == 0 {
            *relation = Some(Relation {
                tablespace: self.u32("tablespace")?,
                database: self.u32("database")?,
                number: self.u32("relation")?,
            });
        }
        let relation =
            relation.ok_or_else(|| self.invalid("block of the same relation as none"))?;
        let block = self.u32("block number")?;
        let block = BlockRef {
            id,
            relation,
            fork,
            block,
            image,
        };
        Ok((block, len))
    }

    fn take<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], InvalidBody> {
        let bytes = self.body[self.offset..].first_chunk::<N>();
        let bytes = *bytes.ok_or_else(|| self.invalid(what))?;
        self.offset += N;
        Ok(bytes)
    }

    fn u8(&mut self, what: &'static str) -> Result<u8, InvalidBody> {
        self.take::<1>(what).map(|[byte]| byte)
    }

    fn u16(&mut self, what: &'static str) -> Result<u16, InvalidBody> {
        self.take::<2>(what).map(|bytes| u16_at(&bytes, 0))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, InvalidBody> {
        self.take::<4>(what).map(|bytes| u32_at(&bytes, 0))
    }

    fn invalid(&self, what: &'static str) -> InvalidBody {
        InvalidBody {
            what,
            offset: self.offset,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block_header(id: u8, flags: u8, data_len: u16) -> Vec<u8> {
        let mut bytes = vec![id, flags];
        bytes.extend(data_len.to_le_bytes());
        bytes
    }

    fn relation(bytes: &mut Vec<u8>, [tablespace, database, number]: [u32; 3]) {
        for word in [tablespace, database, number] {
            bytes.extend(word.to_le_bytes());
        }
    }

    #[test]
    fn blocks_of_one_relation_name_it_once() {
        let mut body = block_header(0, HAS_IMAGE, 3);
        body.extend([4, 0, 24, 0, IMAGE_HAS_HOLE | IMAGE_APPLY]);
        relation(&mut body, [1663, 5, 16384]);
        body.extend(7u32.to_le_bytes());
        body.extend(block_header(1, SAME_REL | 2, 0));
        body.extend(0u32.to_le_bytes());
        body.extend([
            ID_ORIGIN,
            9,
            9,
            ID_TOPLEVEL_XID,
            1,
            2,
            3,
            4,
            ID_DATA_SHORT,
            2,
        ]);
        body.extend([0; 4 + 3 + 2]);
        let blocks = block_refs(&body).expect("sound");
        let table = Relation {
            tablespace: 1663,
            database: 5,
            number: 16384,
        };
        let image = Some(Image {
            len: 4,
            is_restored: true,
        });
        assert_eq!(
            blocks,
            [
                BlockRef {
                    id: 0,
                    relation: table,
                    fork: Fork::Main,
                    block: 7,
                    image
                },
                BlockRef {
                    id: 1,
                    relation: table,
                    fork: Fork::VisibilityMap,
                    block: 0,
                    image: None
                },
            ]
        );
    }

    #[test]
    fn a_compressed_image_with_a_hole_says_how_long_that_is() {
        let mut body = block_header(0, HAS_IMAGE, 0);
        body.extend([2, 0, 24, 0, IMAGE_HAS_HOLE | 0x08, 100, 0]);
        relation(&mut body, [1, 2, 3]);
        body.extend(4u32.to_le_bytes());
        body.extend([0; 2]);
        let blocks = block_refs(&body).expect("sound");
        assert!(matches!(
            blocks[0].image,
            Some(Image {
                len: 2,
                is_restored: false
            })
        ));
    }

    #[test]
    fn main_data_alone_has_no_blocks() {
        assert_eq!(block_refs(&[]), Ok(vec![]));
        assert_eq!(block_refs(&[ID_DATA_SHORT, 1, 0]), Ok(vec![]));
        assert_eq!(block_refs(&[ID_DATA_LONG, 1, 0, 0, 0, 0]), Ok(vec![]));
    }

    #[test]
    fn what_no_server_writes_is_refused() {
        let same_as_none = {
            let mut body = block_header(0, SAME_REL, 0);
            body.extend([0; 4]);
            body
        };
        for body in [
            &[ID_DATA_SHORT][..],
            &[ID_DATA_SHORT, 2, 0],
            &[ID_DATA_SHORT, 0, 0],
            &[ID_DATA_LONG, 255, 255, 255, 255],
            &[33],
            &[251],
            &[0, 4, 0, 0],
            &[0, 0, 0],
            &same_as_none,
        ] {
            assert!(block_refs(body).is_err(), "{body:?}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = block_refs(&body);
        }
    }
}
