//! From a [`Geometry`] to the driver's parameters, checked with the driver's own rules.
//!
//! The rules are those of `ublk_validate_params()` (`drivers/block/ublk_drv.c`) and of the queue limits behind it
//! (`block/blk-settings.c`), as of Linux 6.12 to 7.3. What is checked here cannot fail with a bare `EINVAL` there.

use crate::backend::{Geometry, SECTOR_SIZE};
use crate::error::{Error, Result};
use crate::sys::map::page_size;
use crate::sys::ublk::{self, ParamBasic, ParamDiscard, Params};

/// Largest block or hint: the driver takes shifts up to 28.
const MAX_SHIFTED: u32 = 1 << 28;

/// Checks what ADD_DEV is asked for.
pub(crate) fn check_shape(queues: u16, depth: u16, max_io_bytes: u32, id: Option<u32>) -> Result<()> {
    let page = page_size() as u32;
    if !(1..=ublk::MAX_QUEUES).contains(&queues) {
        return Err(Error::invalid(format!("{queues} queues: choose 1 to {}", ublk::MAX_QUEUES)));
    }
    if !(1..=ublk::MAX_QUEUE_DEPTH).contains(&depth) {
        return Err(Error::invalid(format!("queue depth {depth}: choose 1 to {}", ublk::MAX_QUEUE_DEPTH)));
    }
    if !max_io_bytes.is_multiple_of(page) || !(page..=ublk::MAX_IO_BUF_BYTES).contains(&max_io_bytes) {
        return Err(Error::invalid(format!(
            "largest I/O of {max_io_bytes} bytes: choose a multiple of the page size ({page}) up to {}",
            ublk::MAX_IO_BUF_BYTES
        )));
    }
    if let Some(id) = id.filter(|id| *id >= 1 << 20) {
        return Err(Error::invalid(format!("device id {id}: choose one below {}", 1 << 20)));
    }
    Ok(())
}

/// Checks a geometry that stands alone, before any device exists.
pub(crate) fn check_geometry(geometry: &Geometry) -> Result<()> {
    let Geometry { size, logical_block, physical_block, io_min, io_opt, .. } = *geometry;
    let page = page_size() as u32;
    if !logical_block.is_power_of_two() || !(512..=page).contains(&logical_block) {
        return Err(Error::invalid(format!(
            "logical block of {logical_block} bytes: choose a power of two from 512 to the page size ({page})"
        )));
    }
    if !physical_block.is_power_of_two() || !(logical_block..=MAX_SHIFTED).contains(&physical_block) {
        return Err(Error::invalid(format!(
            "physical block of {physical_block} bytes: choose a power of two from the logical block ({logical_block}) \
             to {MAX_SHIFTED}"
        )));
    }
    if size == 0 || !size.is_multiple_of(u64::from(logical_block)) || i64::try_from(size).is_err() {
        return Err(Error::invalid(format!(
            "size of {size} bytes: choose a multiple of the logical block ({logical_block}), above 0 and below 2^63"
        )));
    }
    for (name, hint) in [("io_min", io_min), ("io_opt", io_opt)] {
        if hint != 0 && (!hint.is_power_of_two() || !(512..=MAX_SHIFTED).contains(&hint)) {
            return Err(Error::invalid(format!(
                "{name} of {hint} bytes: choose a power of two from 512 to {MAX_SHIFTED}, or 0 for none"
            )));
        }
    }
    if geometry.fua && !geometry.volatile_cache {
        return Err(Error::invalid(
            "FUA without a volatile cache: every completed write is durable then; drop one or declare the other",
        ));
    }
    if let Some(limits) = geometry.discard {
        check_range_limit("discard", limits.max_bytes, logical_block)?;
        if limits.granularity < logical_block || !limits.granularity.is_multiple_of(logical_block) {
            return Err(Error::invalid(format!(
                "discard granularity of {} bytes: choose a multiple of the logical block ({logical_block})",
                limits.granularity
            )));
        }
        if !limits.alignment.is_multiple_of(logical_block) || limits.alignment >= limits.granularity {
            return Err(Error::invalid(format!(
                "discard alignment of {} bytes: choose a multiple of the logical block ({logical_block}) below the \
                 granularity ({})",
                limits.alignment, limits.granularity
            )));
        }
    }
    if let Some(max) = geometry.write_zeroes {
        check_range_limit("write-zeroes", max, logical_block)?;
    }
    Ok(())
}

fn check_range_limit(name: &str, max_bytes: u64, logical_block: u32) -> Result<()> {
    // The block layer counts a bio's bytes in 32 bits.
    if max_bytes == 0 || !max_bytes.is_multiple_of(u64::from(logical_block)) || max_bytes > u64::from(u32::MAX) {
        return Err(Error::invalid(format!(
            "largest {name} of {max_bytes} bytes: choose a multiple of the logical block ({logical_block}), above 0 and \
             below 4 GiB"
        )));
    }
    Ok(())
}

/// The driver's parameters for a geometry that was checked, on a device that was granted `max_io_bytes`.
pub(crate) fn params(geometry: &Geometry, max_io_bytes: u32) -> Params {
    let sectors = |bytes: u64| (bytes / SECTOR_SIZE) as u32;
    let shift = |bytes: u32| bytes.checked_ilog2().unwrap_or(0) as u8;
    let mut attrs = 0;
    for (wanted, attr) in [
        (geometry.read_only, ublk::ATTR_READ_ONLY),
        (geometry.rotational, ublk::ATTR_ROTATIONAL),
        (geometry.volatile_cache, ublk::ATTR_VOLATILE_CACHE),
        (geometry.fua, ublk::ATTR_FUA),
    ] {
        if wanted {
            attrs |= attr;
        }
    }
    let mut params = Params {
        types: ublk::PARAM_TYPE_BASIC,
        basic: ParamBasic {
            attrs,
            logical_bs_shift: shift(geometry.logical_block),
            physical_bs_shift: shift(geometry.physical_block),
            io_opt_shift: shift(geometry.io_opt),
            io_min_shift: shift(geometry.io_min.max(geometry.physical_block)),
            max_sectors: sectors(u64::from(max_io_bytes)),
            dev_sectors: geometry.sectors(),
            ..ParamBasic::default()
        },
        ..Params::default()
    };
    if geometry.discard.is_some() || geometry.write_zeroes.is_some() {
        params.types |= ublk::PARAM_TYPE_DISCARD;
        params.discard = ParamDiscard {
            // Not 0 even when only write-zeroes is offered: the driver refuses that.
            discard_granularity: geometry.discard.map_or(geometry.logical_block, |limits| limits.granularity),
            discard_alignment: geometry.discard.map_or(0, |limits| limits.alignment),
            max_discard_sectors: geometry.discard.map_or(0, |limits| sectors(limits.max_bytes)),
            max_write_zeroes_sectors: geometry.write_zeroes.map_or(0, sectors),
            max_discard_segments: 1,
            reserved0: 0,
        };
    }
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::DiscardLimits;

    #[test]
    fn absurd_geometries_are_refused_with_what_to_choose() {
        let good = Geometry::bytes(1 << 20);
        let limits = DiscardLimits { granularity: 4096, alignment: 0, max_bytes: 1 << 20 };
        let bad = [
            Geometry { size: 0, ..good },
            Geometry { size: 1000, ..good },
            Geometry { size: 1 << 63, ..good },
            good.logical_block(256),
            good.logical_block(1536),
            good.logical_block(1 << 20),
            Geometry { logical_block: 4096, physical_block: 512, ..good },
            good.physical_block(3 << 10),
            good.physical_block(1 << 29),
            good.io_hints(1000, 0),
            good.io_hints(0, 1 << 30),
            Geometry { fua: true, ..good },
            good.discard(0),
            good.discard(768),
            good.logical_block(4096).discard(512),
            good.discard_limits(DiscardLimits { max_bytes: 0, ..limits }),
            good.discard_limits(DiscardLimits { max_bytes: 1 << 32, ..limits }),
            good.discard_limits(DiscardLimits { alignment: 4096, ..limits }),
            good.write_zeroes_max(100),
        ];
        for geometry in bad {
            let error = check_geometry(&geometry).expect_err("refused");
            assert!(error.to_string().contains("choose") || error.to_string().contains("declare"), "{error}");
        }
        for geometry in [good, good.fua().discard(4096).write_zeroes(), good.discard_limits(limits), good.read_only()]
        {
            check_geometry(&geometry).expect("accepted");
        }
    }

    #[test]
    fn absurd_shapes_are_refused() {
        assert!(check_shape(1, 1, 4096, None).is_ok());
        assert!(check_shape(4096, 4096, 32 << 20, Some((1 << 20) - 1)).is_ok());
        for (queues, depth, max, id) in [
            (0, 1, 4096, None),
            (4097, 1, 4096, None),
            (1, 0, 4096, None),
            (1, 4097, 4096, None),
            (1, 1, 0, None),
            (1, 1, 512, None),
            (1, 1, 5000, None),
            (1, 1, 64 << 20, None),
            (1, 1, 4096, Some(1 << 20)),
        ] {
            assert!(check_shape(queues, depth, max, id).is_err(), "{queues} {depth} {max} {id:?}");
        }
    }

    #[test]
    fn parameters_say_what_the_geometry_says() {
        let geometry = Geometry::bytes(5 << 30).logical_block(4096).fua().write_zeroes_max(8 << 20);
        let params = params(&geometry, 1 << 20);
        assert_eq!(params.basic.dev_sectors, 5 << 21);
        assert_eq!(params.basic.logical_bs_shift, 12);
        assert_eq!(params.basic.max_sectors, 2048);
        assert_eq!(params.basic.attrs, ublk::ATTR_VOLATILE_CACHE | ublk::ATTR_FUA);
        assert_eq!(params.discard.max_discard_sectors, 0);
        assert_eq!(params.discard.max_write_zeroes_sectors, 16_384);
        assert_eq!(params.discard.discard_granularity, 4096);
    }
}
