//! `safekeeper tail`: prints a cluster's log as it is written, a line a record, or sums it up.
//!
//! Lines are those of `pg_waldump`, but for what a resource manager says of its own records, of which
//! there is only the name; of rarer ones not even that. Everything is checked on the way
//! (`safekeeper_client::follower`), so a run that ends well has verified what it has printed.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use safekeeper_client::follower::{FollowError, FollowedRecord, Follower, FollowerConfig, Turn};
use safekeeper_client::wal_client::ClientError;
use safekeeper_protocol::Lsn;
use safekeeper_wal::rmgr::{record_name, rmgr_name};
use safekeeper_wal::{BlockRef, Fork, InvalidBody, block_refs};

/// Longest pause between two attempts to find somebody to follow.
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// How long a turn waits for WAL: as late does it notice that all addresses are gone.
const PATIENCE: Duration = Duration::from_millis(500);

/// What is to be printed.
#[derive(Clone, Debug)]
pub struct TailRequest {
    pub follower: FollowerConfig,
    /// Goes on for ever, also over the loss of a server. Else to where the log ended at the start.
    pub follows: bool,
    /// Not beyond this.
    pub end_lsn: Option<Lsn>,
    pub limit: Option<u64>,
    pub form: Form,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A line a record, as `pg_waldump`.
    Lines,
    /// The same as JSON.
    Json,
    /// Counts and bytes of each resource manager, at the end.
    Summary,
}

#[derive(Debug, thiserror::Error)]
pub enum TailError {
    #[error(transparent)]
    Follow(#[from] FollowError),
    #[error("record at {lsn}: {source}")]
    Body { lsn: Lsn, source: InvalidBody },
    #[error("could not write: {0}")]
    Output(#[from] io::Error),
}

impl TailError {
    /// Nobody was there to be asked.
    pub fn is_not_running(&self) -> bool {
        let TailError::Follow(FollowError::Client { source, .. }) = self else {
            return false;
        };
        matches!(
            source,
            ClientError::Connect(_) | ClientError::Resolve(_) | ClientError::TimedOut(_)
        )
    }
}

/// Prints to `output` until the log's end, the limit, or an error; `complain` hears of lost connections.
/// A reader that has seen enough is no error.
pub fn tail(
    request: &TailRequest,
    output: &mut dyn Write,
    mut complain: impl FnMut(&str),
) -> Result<(), TailError> {
    let mut printer = Printer {
        form: request.form,
        left: request.limit.unwrap_or(u64::MAX),
        end_lsn: request.end_lsn.unwrap_or(Lsn(u64::MAX)),
        sums: Vec::new(),
        output: io::BufWriter::new(output),
        failure: None,
    };
    let ended = follow(request, &mut printer, &mut complain).and_then(|()| printer.finish());
    match ended {
        Err(TailError::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn follow(
    request: &TailRequest,
    printer: &mut Printer<'_>,
    complain: &mut impl FnMut(&str),
) -> Result<(), TailError> {
    let mut follower = Follower::connect(request.follower.clone())?;
    let end_lsn = match request.follows {
        true => printer.end_lsn,
        false => printer.end_lsn.min(follower.end_lsn()),
    };
    while printer.left > 0 && follower.received_lsn() < end_lsn {
        let turn = follower.turn(PATIENCE, |record| printer.print(&record));
        if let Some(failure) = printer.failure.take() {
            return Err(failure);
        }
        match turn {
            Ok(Turn::TimelineSwitch { tli, lsn }) => {
                complain(&format!("timeline {tli} begins at {lsn}"));
            }
            Ok(_) => {}
            Err(error) if request.follows && error.may_pass() && !error.is_removed() => {
                complain(&error.to_string());
                find_another(&mut follower, complain)?;
            }
            Err(error) => return Err(error.into()),
        }
        printer.output.flush()?;
    }
    follower.report().or_else(|error| match error.may_pass() {
        // It does not want to know.
        true => Ok(()),
        false => Err(error.into()),
    })
}

/// Until one can be followed.
fn find_another(
    follower: &mut Follower,
    complain: &mut impl FnMut(&str),
) -> Result<(), FollowError> {
    let mut pause = Duration::from_millis(50);
    let mut said = String::new();
    let began = Instant::now();
    loop {
        match follower.reconnect() {
            Ok(()) => {
                let (address, lsn) = (follower.address(), follower.position());
                complain(&format!(
                    "goes on at {lsn} with {address} after {:.1} s",
                    began.elapsed().as_secs_f32()
                ));
                return Ok(());
            }
            Err(error) if error.may_pass() && !error.is_removed() => {
                if error.to_string() != said {
                    said = error.to_string();
                    complain(&said);
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(PAUSE_MAX);
            }
            Err(error) => return Err(error),
        }
    }
}

struct Printer<'a> {
    form: Form,
    left: u64,
    end_lsn: Lsn,
    /// By resource manager.
    sums: Vec<Sum>,
    output: io::BufWriter<&'a mut dyn Write>,
    failure: Option<TailError>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    records: u64,
    record_bytes: u64,
    image_bytes: u64,
}

impl Printer<'_> {
    fn print(&mut self, it: &FollowedRecord<'_>) {
        if self.left == 0 || self.failure.is_some() || it.record.start_lsn >= self.end_lsn {
            return;
        }
        self.left -= 1;
        self.failure = self.try_print(it).err();
    }

    fn try_print(&mut self, it: &FollowedRecord<'_>) -> Result<(), TailError> {
        let lsn = it.record.start_lsn;
        let blocks = block_refs(it.body).map_err(|source| TailError::Body { lsn, source })?;
        let image_bytes: u32 = blocks
            .iter()
            .filter_map(|block| block.image)
            .map(|image| u32::from(image.len))
            .sum();
        match self.form {
            Form::Lines => self.print_line(it, &blocks, image_bytes)?,
            Form::Json => self.print_json(it, &blocks, image_bytes)?,
            Form::Summary => {
                let at = usize::from(it.record.header.rmgr_id);
                if self.sums.len() <= at {
                    self.sums.resize(at + 1, Sum::default());
                }
                let sum = &mut self.sums[at];
                sum.records += 1;
                sum.record_bytes += u64::from(it.record.header.total_len - image_bytes);
                sum.image_bytes += u64::from(image_bytes);
            }
        }
        Ok(())
    }

    /// `XLogDumpDisplayRecord` and `XLogRecGetBlockRefInfo`.
    fn print_line(
        &mut self,
        it: &FollowedRecord<'_>,
        blocks: &[BlockRef],
        image_bytes: u32,
    ) -> io::Result<()> {
        let header = &it.record.header;
        write!(
            self.output,
            "rmgr: {:<11} len (rec/tot): {:>6}/{:>6}, tx: {:>10}, lsn: {}, prev {}, desc: {}",
            rmgr_name(header.rmgr_id),
            header.total_len - image_bytes,
            header.total_len,
            header.xid,
            padded(it.record.start_lsn),
            padded(header.prev_lsn),
            name_of(it)
        )?;
        for block in blocks {
            let relation = block.relation;
            write!(
                self.output,
                ", blkref #{}: rel {}/{}/{}",
                block.id, relation.tablespace, relation.database, relation.number
            )?;
            if block.fork != Fork::Main {
                write!(self.output, " fork {}", block.fork.name())?;
            }
            write!(self.output, " blk {}", block.block)?;
            match block.image {
                Some(image) if image.is_restored => write!(self.output, " FPW")?,
                Some(_) => write!(self.output, " FPW for WAL verification")?,
                None => {}
            }
        }
        writeln!(self.output)
    }

    fn print_json(
        &mut self,
        it: &FollowedRecord<'_>,
        blocks: &[BlockRef],
        image_bytes: u32,
    ) -> io::Result<()> {
        let header = &it.record.header;
        let block = |block: &BlockRef| {
            let relation = block.relation;
            serde_json::json!({
                "id": block.id,
                "tablespace": relation.tablespace,
                "database": relation.database,
                "relation": relation.number,
                "fork": block.fork.name(),
                "block": block.block,
                "image_bytes": block.image.map(|image| image.len),
            })
        };
        let line = serde_json::json!({
            "lsn": it.record.start_lsn.to_string(),
            "end_lsn": it.record.end_lsn.to_string(),
            "prev_lsn": header.prev_lsn.to_string(),
            "rmgr": rmgr_name(header.rmgr_id),
            "record": name_of(it),
            "xid": header.xid,
            "len": header.total_len,
            "image_bytes": image_bytes,
            "blocks": blocks.iter().map(block).collect::<Vec<_>>(),
        });
        writeln!(self.output, "{line}")
    }

    fn finish(&mut self) -> Result<(), TailError> {
        if self.form == Form::Summary {
            self.print_summary()?;
        }
        Ok(self.output.flush()?)
    }

    fn print_summary(&mut self) -> io::Result<()> {
        writeln!(
            self.output,
            "{:<20} {:>12} {:>15} {:>15} {:>15}",
            "rmgr", "records", "record bytes", "image bytes", "bytes"
        )?;
        let mut total = Sum::default();
        let sums = std::mem::take(&mut self.sums);
        for (rmgr_id, sum) in (0..=u8::MAX).zip(sums) {
            if sum.records > 0 {
                self.print_sum(&rmgr_name(rmgr_id), sum)?;
            }
            total.records += sum.records;
            total.record_bytes += sum.record_bytes;
            total.image_bytes += sum.image_bytes;
        }
        self.print_sum("all", total)
    }

    fn print_sum(&mut self, name: &str, sum: Sum) -> io::Result<()> {
        writeln!(
            self.output,
            "{name:<20} {:>12} {:>15} {:>15} {:>15}",
            sum.records,
            sum.record_bytes,
            sum.image_bytes,
            sum.record_bytes + sum.image_bytes
        )
    }
}

fn name_of(it: &FollowedRecord<'_>) -> String {
    let header = &it.record.header;
    let name = record_name(it.version, header.rmgr_id, header.info);
    name.map_or_else(
        || format!("info {:#04x}", header.info & 0xF0),
        str::to_owned,
    )
}

/// As `pg_waldump` prints positions.
fn padded(lsn: Lsn) -> String {
    format!("{:X}/{:08X}", lsn.0 >> 32, lsn.0 & u64::from(u32::MAX))
}
