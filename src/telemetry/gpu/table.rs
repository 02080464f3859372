//! GPU metrics. Their labels are those of dcgm-exporter, so that the two join.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Unit;

use super::health::APPLICATION_XIDS;
use super::{Driver, Identity, Instance, Reading, Throttle, Verdict};
use crate::telemetry::metrics::Table;

/// XIDs whose series exist from the start, beside those of programs: memory errors and their consequences, NVLink, loss.
const XIDS: [u64; 7] = [48, 63, 64, 74, 79, 94, 95];

type Fraction = Gauge<f64, AtomicU64>;

/// Labels of a GPU as dcgm-exporter writes them.
#[allow(non_snake_case, reason = "the names are dcgm-exporter's")]
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, EncodeLabelSet)]
struct GpuLabels {
    gpu: String,
    UUID: String,
    pci_bus_id: String,
    device: String,
    modelName: String,
    GPU_I_PROFILE: String,
    GPU_I_ID: String,
    Hostname: String,
}

/// Labels of a GPU and more.
macro_rules! label_set {
    ($name:ident { $($field:ident: $type:ty),* }) => {
        #[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
        struct $name {
            #[prometheus(flatten)]
            gpu: GpuLabels,
            $($field: $type,)*
        }
    };
}

label_set!(DirectionLabels { direction: &'static str });
label_set!(EccLabels { kind: &'static str, scope: &'static str });
label_set!(CauseLabels { cause: &'static str });
label_set!(ReasonLabels { reason: &'static str });
label_set!(StateLabels { state: &'static str });
label_set!(VerdictLabels { verdict: &'static str });
label_set!(XidLabels { xid: u64 });

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriverLabels {
    version: String,
    cuda: String,
}

/// The GPU metrics of the daemon. None has a series before a driver is found.
#[derive(Debug)]
pub struct GpuMetrics {
    driver_up: Family<DriverLabels, Gauge>,
    memory_bytes: Family<GpuLabels, Gauge>,
    memory_used_bytes: Family<GpuLabels, Gauge>,
    utilization: Family<GpuLabels, Fraction>,
    memory_utilization: Family<GpuLabels, Fraction>,
    pcie_bytes_per_second: Family<DirectionLabels, Gauge>,
    link_generation: Family<GpuLabels, Gauge>,
    link_generation_max: Family<GpuLabels, Gauge>,
    link_width: Family<GpuLabels, Gauge>,
    link_width_max: Family<GpuLabels, Gauge>,
    ecc_errors: Family<EccLabels, Gauge>,
    remapped_rows: Family<CauseLabels, Gauge>,
    remap_pending: Family<GpuLabels, Gauge>,
    remap_failed: Family<GpuLabels, Gauge>,
    throttled: Family<ReasonLabels, Gauge>,
    temperature: Family<GpuLabels, Gauge>,
    power: Family<GpuLabels, Fraction>,
    mig: Family<GpuLabels, Gauge>,
    health: Family<StateLabels, Gauge>,
    verdicts: Family<VerdictLabels, Counter>,
    xid_errors: Family<XidLabels, Counter>,
}

impl GpuMetrics {
    pub(in crate::telemetry) fn new(t: &mut Table) -> GpuMetrics {
        GpuMetrics {
            driver_up: t.add("gpu_driver_up", "Whether the NVIDIA driver answers", Family::default()),
            memory_bytes: t.bytes("gpu_memory", "Memory of a GPU or an instance", Family::default()),
            memory_used_bytes: t.bytes("gpu_memory_used", "Memory in use by anyone", Family::default()),
            utilization: t.add(
                "gpu_utilization_ratio",
                "Share of time in which it computed",
                Family::default(),
            ),
            memory_utilization: t.add(
                "gpu_memory_utilization_ratio",
                "Share of time in which its memory was read or written",
                Family::default(),
            ),
            pcie_bytes_per_second: t.add(
                "gpu_pcie_bytes_per_second",
                "Bytes over PCIe, by direction as the GPU sees it",
                Family::default(),
            ),
            link_generation: t.add("gpu_pcie_link_generation", "PCIe generation now", Family::default()),
            link_generation_max: t.add(
                "gpu_pcie_link_generation_max",
                "PCIe generation at most",
                Family::default(),
            ),
            link_width: t.add("gpu_pcie_link_width", "PCIe lanes now", Family::default()),
            link_width_max: t.add("gpu_pcie_link_width_max", "PCIe lanes at most", Family::default()),
            ecc_errors: t.add("gpu_ecc_errors", "Memory errors", Family::default()),
            remapped_rows: t.add("gpu_remapped_rows", "Rows of memory that were replaced", Family::default()),
            remap_pending: t.add(
                "gpu_row_remap_pending",
                "Whether a row waits for a reset",
                Family::default(),
            ),
            remap_failed: t.add("gpu_row_remap_failed", "Whether no spare row was left", Family::default()),
            throttled: t.add("gpu_throttled", "Whether it is slowed down, by reason", Family::default()),
            temperature: t.with_unit("gpu_temperature", "Temperature", Unit::Celsius, Family::default()),
            power: t.with_unit("gpu_power", "Power draw", Unit::Other("watts".to_owned()), Family::default()),
            mig: t.add("gpu_mig_instances", "Instances that it is cut into", Family::default()),
            health: t.add("gpu_health", "Whether its memory can be trusted, by state", Family::default()),
            verdicts: t.add("gpu_verdicts", "Verdicts of the health gate", Family::default()),
            xid_errors: t.add("gpu_xid_errors", "XIDs that the driver reported", Family::default()),
        }
    }

    /// Makes the series of what happens to a GPU, at zero.
    pub fn known(&self, gpu: &Identity, hostname: &str) {
        let labels = labels_of(gpu, hostname);
        for verdict in Verdict::ALL {
            drop(
                self.verdicts
                    .get_or_create(&VerdictLabels { gpu: labels.clone(), verdict: verdict.as_str() }),
            );
        }
        for xid in XIDS.into_iter().chain(APPLICATION_XIDS) {
            drop(self.xid_errors.get_or_create(&XidLabels { gpu: labels.clone(), xid }));
        }
        self.set_health(&labels, Verdict::Healthy);
    }

    /// The driver reported an XID.
    pub fn xid(&self, gpu: &Identity, hostname: &str, xid: u64) {
        self.xid_errors.get_or_create(&XidLabels { gpu: labels_of(gpu, hostname), xid }).inc();
    }

    /// There is a new verdict.
    pub fn verdict(&self, gpu: &Identity, hostname: &str, verdict: Verdict) {
        let gpu = labels_of(gpu, hostname);
        self.set_health(&gpu, verdict);
        self.verdicts.get_or_create(&VerdictLabels { gpu, verdict: verdict.as_str() }).inc();
    }

    fn set_health(&self, gpu: &GpuLabels, now: Verdict) {
        for verdict in Verdict::ALL {
            let labels = StateLabels { gpu: gpu.clone(), state: verdict.as_str() };
            self.health.get_or_create(&labels).set((verdict == now).into());
        }
    }

    /// Takes away what was read: it is shown only as long as the driver answers.
    pub fn unread(&self, driver: &Driver) {
        self.clear();
        self.set_driver(driver, false);
    }

    /// Shows what was read now, and nothing of what was read before.
    pub fn read<'a>(
        &self,
        driver: &Driver,
        hostname: &str,
        readings: impl Iterator<Item = (&'a Identity, &'a Reading)>,
    ) {
        self.clear();
        self.set_driver(driver, true);
        for (gpu, reading) in readings {
            self.show(labels_of(gpu, hostname), reading);
        }
    }

    fn set_driver(&self, driver: &Driver, up: bool) {
        let labels = DriverLabels { version: driver.version.clone(), cuda: driver.cuda.clone() };
        self.driver_up.get_or_create(&labels).set(up.into());
    }

    fn clear(&self) {
        for family in [
            &self.memory_bytes,
            &self.memory_used_bytes,
            &self.link_generation,
            &self.link_generation_max,
            &self.link_width,
            &self.link_width_max,
            &self.remap_pending,
            &self.remap_failed,
            &self.temperature,
            &self.mig,
        ] {
            family.clear();
        }
        for family in [&self.utilization, &self.memory_utilization, &self.power] {
            family.clear();
        }
        self.pcie_bytes_per_second.clear();
        self.ecc_errors.clear();
        self.remapped_rows.clear();
        self.throttled.clear();
    }

    fn show(&self, gpu: GpuLabels, reading: &Reading) {
        let whole = |family: &Family<GpuLabels, Gauge>, value: Option<u64>| {
            if let Some(value) = value {
                family.get_or_create(&gpu).set(gauge(value));
            }
        };
        let fraction = |family: &Family<GpuLabels, Fraction>, value: Option<f64>| {
            if let Some(value) = value {
                family.get_or_create(&gpu).set(value);
            }
        };
        whole(&self.memory_bytes, reading.memory.map(|memory| memory.total_bytes));
        whole(&self.memory_used_bytes, reading.memory.map(|memory| memory.used_bytes));
        fraction(&self.utilization, reading.utilization);
        fraction(&self.memory_utilization, reading.memory_utilization);
        for (direction, value) in [("tx", reading.pcie_sent), ("rx", reading.pcie_received)] {
            if let Some(value) = value {
                let labels = DirectionLabels { gpu: gpu.clone(), direction };
                self.pcie_bytes_per_second.get_or_create(&labels).set(gauge(value));
            }
        }
        whole(&self.link_generation, reading.link.generation.map(u64::from));
        whole(&self.link_generation_max, reading.link.generation_max.map(u64::from));
        whole(&self.link_width, reading.link.width.map(u64::from));
        whole(&self.link_width_max, reading.link.width_max.map(u64::from));
        for (kind, scope, value) in [
            ("corrected", "volatile", reading.ecc.corrected_volatile),
            ("uncorrected", "volatile", reading.ecc.uncorrected_volatile),
            ("corrected", "aggregate", reading.ecc.corrected_aggregate),
            ("uncorrected", "aggregate", reading.ecc.uncorrected_aggregate),
        ] {
            if let Some(value) = value {
                let labels = EccLabels { gpu: gpu.clone(), kind, scope };
                self.ecc_errors.get_or_create(&labels).set(gauge(value));
            }
        }
        for (cause, value) in
            [("correctable", reading.rows.correctable), ("uncorrectable", reading.rows.uncorrectable)]
        {
            if let Some(value) = value {
                let labels = CauseLabels { gpu: gpu.clone(), cause };
                self.remapped_rows.get_or_create(&labels).set(gauge(value));
            }
        }
        whole(&self.remap_pending, reading.rows.pending.map(u64::from));
        whole(&self.remap_failed, reading.rows.failed.map(u64::from));
        for (reason, now) in Throttle::ALL.iter().zip(reading.throttled.iter().flatten()) {
            let labels = ReasonLabels { gpu: gpu.clone(), reason: reason.as_str() };
            self.throttled.get_or_create(&labels).set((*now).into());
        }
        whole(&self.temperature, reading.temperature.map(u64::from));
        fraction(&self.power, reading.power);
        whole(&self.mig, Some(reading.instances.len() as u64));
        for instance in &reading.instances {
            let gpu = labels_of_instance(&gpu, instance);
            if let Some(memory) = instance.memory {
                self.memory_bytes.get_or_create(&gpu).set(gauge(memory.total_bytes));
                self.memory_used_bytes.get_or_create(&gpu).set(gauge(memory.used_bytes));
            }
        }
    }
}

fn gauge(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

fn labels_of(gpu: &Identity, hostname: &str) -> GpuLabels {
    GpuLabels {
        gpu: gpu.index.to_string(),
        UUID: gpu.uuid.clone(),
        pci_bus_id: gpu.pci_bus_id.clone(),
        device: gpu.minor.map(|minor| format!("nvidia{minor}")).unwrap_or_default(),
        modelName: gpu.name.clone(),
        GPU_I_PROFILE: String::new(),
        GPU_I_ID: String::new(),
        Hostname: hostname.to_owned(),
    }
}

/// An instance has the UUID of its GPU here, as it has in dcgm-exporter.
fn labels_of_instance(gpu: &GpuLabels, instance: &Instance) -> GpuLabels {
    GpuLabels {
        GPU_I_PROFILE: instance.profile.clone(),
        GPU_I_ID: instance.id.map(|id| id.to_string()).unwrap_or_default(),
        ..gpu.clone()
    }
}
