//! `ublkit list`

use std::fmt::Write;

use serde_json::{Value, json};
use ublkit::ctrl::DeviceInfo;
use ublkit::holders::{self, Holders};
use ublkit::orphan::{self, Class, Found};
use ublkit::sys::ublk::{ATTR_READ_ONLY, ParamBasic};
use ublkit::{Controller, SECTOR_SIZE};

use crate::args;
use crate::failure::Failure;
use crate::output;
use crate::units::format_bytes;

pub(crate) fn run(arguments: &args::List) -> Result<(), Failure> {
    let controller = Controller::open()?;
    let mut rows = Vec::new();
    for found in orphan::list(&controller, arguments.grace)? {
        rows.push(Row::of(&controller, found, arguments.holders));
    }
    if arguments.json {
        let devices: Vec<Value> = rows.iter().map(Row::json).collect();
        return output::print(format_args!("{}\n", json!({ "devices": devices })));
    }
    if rows.is_empty() {
        return output::print("no ublk devices\n");
    }
    output::print(table(&rows))
}

/// A device and what the driver tells about it; nothing where the device has gone in the meantime.
struct Row {
    found: Found,
    info: Option<DeviceInfo>,
    basic: Option<ParamBasic>,
    comm: Option<String>,
    holders: Option<Holders>,
}

impl Row {
    fn of(controller: &Controller, found: Found, with_holders: bool) -> Self {
        let id = found.id;
        let info = controller.get_dev_info(id).or_else(|_| controller.get_dev_info2(id)).ok();
        let basic = controller.get_params(id).ok().map(|params| params.basic);
        let comm = (found.server_pid > 0)
            .then(|| std::fs::read_to_string(format!("/proc/{}/comm", found.server_pid)).ok())
            .flatten()
            .map(|comm| comm.trim_end().to_owned());
        let holders = with_holders.then(|| holders::of_ublk(id));
        Self { found, info, basic, comm, holders }
    }

    fn state(&self) -> String {
        self.found.state.map_or_else(|| "?".to_owned(), |state| state.to_string())
    }

    /// Size and logical block in bytes. Before its parameters are set a device has neither.
    fn sizes(&self) -> Option<(u64, u64)> {
        let basic = self.basic.filter(|basic| basic.logical_bs_shift != 0)?;
        Some((basic.dev_sectors.checked_mul(SECTOR_SIZE)?, 1u64.checked_shl(basic.logical_bs_shift.into())?))
    }

    fn server(&self) -> String {
        match (self.found.server_pid, &self.comm) {
            (..=0, _) => "-".to_owned(),
            (pid, Some(comm)) => format!("{pid} ({comm})"),
            (pid, None) => format!("{pid} (gone)"),
        }
    }

    fn cells(&self) -> [String; 7] {
        let queues = self.info.map_or_else(|| "?".to_owned(), |info| format!("{}x{}", info.queues(), info.depth()));
        let (size, block) = match self.sizes() {
            Some((size, block)) => (format_bytes(size), format_bytes(block)),
            None => ("?".to_owned(), "?".to_owned()),
        };
        [self.found.id.to_string(), self.state(), self.found.class.to_string(), queues, size, block, self.server()]
    }

    fn json(&self) -> Value {
        let Self { found, info, basic, comm, holders } = self;
        let server = (found.server_pid > 0).then(|| json!({ "pid": found.server_pid, "comm": comm }));
        let sizes = self.sizes();
        let mut device = json!({
            "id": found.id,
            "path": ublkit::ctrl::block_path(found.id).to_string_lossy(),
            "state": found.state.map(|state| state.to_string()),
            "class": found.class.to_string(),
            "reason": found.reason,
            "server": server,
            "queues": info.map(|info| info.queues()),
            "depth": info.map(|info| info.depth()),
            "max_io_bytes": info.map(|info| info.max_io_bytes()),
            "features": info.map(|info| info.features().names().collect::<Vec<_>>()),
            "size_bytes": sizes.map(|(size, _)| size),
            "logical_block_bytes": sizes.map(|(_, block)| block),
            "read_only": basic.map(|basic| basic.attrs & ATTR_READ_ONLY != 0),
        });
        if let Some(holders) = holders {
            let found: Vec<Value> = holders
                .found
                .iter()
                .map(|holder| json!({ "pid": holder.pid, "comm": holder.comm, "text": holder.to_string() }))
                .collect();
            device["holders"] = json!({ "found": found, "incomplete": holders.incomplete });
        }
        device
    }
}

fn table(rows: &[Row]) -> String {
    let head = ["ID", "STATE", "CLASS", "QUEUES", "SIZE", "BLOCK", "SERVER"].map(str::to_owned);
    let lines: Vec<[String; 7]> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let widths: [usize; 7] =
        std::array::from_fn(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or_default());
    // The head has no device.
    let devices = std::iter::once(None).chain(rows.iter().map(Some));
    let mut text = String::new();
    for (line, row) in lines.iter().zip(devices) {
        let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
        let Some(row) = row else { continue };
        if row.found.class != Class::Served {
            let _ = writeln!(text, "    {}", row.found.reason);
        }
        if let Some(holders) = &row.holders {
            let _ = writeln!(text, "    held by {holders}");
        }
    }
    text
}
