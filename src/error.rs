//! Error codes and the one error type that leaves the library.
//!
//! Every module has its own `thiserror` enum; each variant maps to a [`Code`]. Codes are append-only strings
//! that clients may match on; each has a section in `docs/errors.md` (a test compares the two).

use std::fmt;

/// What a command line exits with, and how an operator groups errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// The request or the command line is wrong. Exit code 2.
    Usage,
    /// What was asked for does not exist. Exit code 3.
    NotFound,
    /// The caller may not have it. Exit code 4.
    Denied,
    /// The bytes are not what they should be: malformed, truncated, changed, corrupt. Exit code 5.
    Data,
    /// A limit or a budget is reached. Exit code 6.
    Limit,
    /// The daemon cannot be reached, is stopping, or the machine lacks something. Exit code 7.
    Unavailable,
    /// Cancelled, or past its deadline. Exit code 8.
    Cancelled,
    /// A defect of Lodestream or an unexpected answer of the operating system. Exit code 1.
    Internal,
}

impl Class {
    /// The exit code of the command line for an error of this class.
    pub const fn exit_code(self) -> u8 {
        match self {
            Class::Internal => 1,
            Class::Usage => 2,
            Class::NotFound => 3,
            Class::Denied => 4,
            Class::Data => 5,
            Class::Limit => 6,
            Class::Unavailable => 7,
            Class::Cancelled => 8,
        }
    }
}

macro_rules! codes {
    ($($variant:ident = $text:literal, $class:ident, $retryable:literal;)*) => {
        /// A stable error code. The string form is what travels; see `docs/errors.md` for each.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "each code is documented in docs/errors.md")]
        pub enum Code { $($variant,)* }

        impl Code {
            /// All codes, in the order of the table.
            pub const ALL: &[Code] = &[$(Code::$variant,)*];

            /// The stable string.
            pub const fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// The class, which decides the exit code.
            pub const fn class(self) -> Class {
                match self { $(Code::$variant => Class::$class,)* }
            }

            /// Whether the same request may succeed later without anything being changed by the caller.
            pub const fn retryable(self) -> bool {
                match self { $(Code::$variant => $retryable,)* }
            }

            /// The code with this string, if there is one.
            pub fn parse(text: &str) -> Option<Code> {
                match text { $($text => Some(Code::$variant),)* _ => None }
            }
        }
    };
}

codes! {
    ApiBadJson = "api.bad_json", Usage, false;
    ApiBadRequest = "api.bad_request", Usage, false;
    ApiBadParams = "api.bad_params", Usage, false;
    ApiUnknownMethod = "api.unknown_method", Usage, false;
    ApiVersionUnsupported = "api.version_unsupported", Usage, false;
    ApiFrameTooLarge = "api.frame_too_large", Limit, false;
    ApiFrameTimeout = "api.frame_timeout", Limit, false;
    ApiTooManyConnections = "api.too_many_connections", Limit, true;
    ApiTooManyRequests = "api.too_many_requests", Limit, true;
    ApiTooManyFds = "api.too_many_fds", Limit, false;
    ApiReplyTooLarge = "api.reply_too_large", Limit, false;
    ApiSlowReader = "api.slow_reader", Limit, false;
    ArtifactNotFound = "artifact.not_found", NotFound, false;
    ArtifactNotResident = "artifact.not_resident", NotFound, false;
    ArtifactLeased = "artifact.leased", Limit, true;
    ArtifactPinned = "artifact.pinned", Limit, false;
    CatalogEmpty = "catalog.empty", Data, false;
    CatalogTooManyFiles = "catalog.too_many_files", Limit, false;
    CatalogDuplicateTensor = "catalog.duplicate_tensor", Data, false;
    CatalogBadName = "catalog.bad_name", Data, false;
    CatalogTooManyTensors = "catalog.too_many_tensors", Limit, false;
    CatalogGgufArrayTooLong = "catalog.gguf.array_too_long", Limit, false;
    CatalogGgufBadAlignment = "catalog.gguf.bad_alignment", Data, false;
    CatalogGgufBadKey = "catalog.gguf.bad_key", Data, false;
    CatalogGgufBadMagic = "catalog.gguf.bad_magic", Data, false;
    CatalogGgufBadName = "catalog.gguf.bad_name", Data, false;
    CatalogGgufBadShape = "catalog.gguf.bad_shape", Data, false;
    CatalogGgufBadString = "catalog.gguf.bad_string", Data, false;
    CatalogGgufBadValue = "catalog.gguf.bad_value", Data, false;
    CatalogGgufDuplicateKey = "catalog.gguf.duplicate_key", Data, false;
    CatalogGgufHeaderTooLarge = "catalog.gguf.header_too_large", Limit, false;
    CatalogGgufMisaligned = "catalog.gguf.misaligned", Data, false;
    CatalogGgufOutsideFile = "catalog.gguf.outside_file", Data, false;
    CatalogGgufOverlap = "catalog.gguf.overlap", Data, false;
    CatalogGgufStringTooLong = "catalog.gguf.string_too_long", Limit, false;
    CatalogGgufTooManyKeys = "catalog.gguf.too_many_keys", Limit, false;
    CatalogGgufTruncated = "catalog.gguf.truncated", Data, false;
    CatalogGgufUnknownType = "catalog.gguf.unknown_type", Data, false;
    CatalogGgufUnsupportedVersion = "catalog.gguf.unsupported_version", Data, false;
    CatalogIndexAmbiguous = "catalog.index.ambiguous", Data, false;
    CatalogIndexBadName = "catalog.index.bad_name", Data, false;
    CatalogIndexBadWeightMap = "catalog.index.bad_weight_map", Data, false;
    CatalogIndexDuplicateKey = "catalog.index.duplicate_key", Data, false;
    CatalogIndexNotJson = "catalog.index.not_json", Data, false;
    CatalogIndexTensorElsewhere = "catalog.index.tensor_elsewhere", Data, false;
    CatalogIndexTensorMissing = "catalog.index.tensor_missing", Data, false;
    CatalogIndexTooLarge = "catalog.index.too_large", Limit, false;
    CatalogManifestInvalid = "catalog.manifest.invalid", Data, false;
    CatalogSafetensorsBadEntry = "catalog.safetensors.bad_entry", Data, false;
    CatalogSafetensorsBadMetadata = "catalog.safetensors.bad_metadata", Data, false;
    CatalogSafetensorsBadName = "catalog.safetensors.bad_name", Data, false;
    CatalogSafetensorsBadOffsets = "catalog.safetensors.bad_offsets", Data, false;
    CatalogSafetensorsBadShape = "catalog.safetensors.bad_shape", Data, false;
    CatalogSafetensorsDuplicateKey = "catalog.safetensors.duplicate_key", Data, false;
    CatalogSafetensorsHeaderOutsideFile = "catalog.safetensors.header_outside_file", Data, false;
    CatalogSafetensorsHeaderTooLarge = "catalog.safetensors.header_too_large", Limit, false;
    CatalogSafetensorsHeaderTooShort = "catalog.safetensors.header_too_short", Data, false;
    CatalogSafetensorsHole = "catalog.safetensors.hole", Data, false;
    CatalogSafetensorsLeadingSpace = "catalog.safetensors.leading_space", Data, false;
    CatalogSafetensorsMisaligned = "catalog.safetensors.misaligned", Data, false;
    CatalogSafetensorsMissingField = "catalog.safetensors.missing_field", Data, false;
    CatalogSafetensorsNotJson = "catalog.safetensors.not_json", Data, false;
    CatalogSafetensorsNotObject = "catalog.safetensors.not_object", Data, false;
    CatalogSafetensorsNotUtf8 = "catalog.safetensors.not_utf8", Data, false;
    CatalogSafetensorsOffsetsOutsideFile = "catalog.safetensors.offsets_outside_file", Data, false;
    CatalogSafetensorsOffsetsReversed = "catalog.safetensors.offsets_reversed", Data, false;
    CatalogSafetensorsOverlap = "catalog.safetensors.overlap", Data, false;
    CatalogSafetensorsPartialByte = "catalog.safetensors.partial_byte", Data, false;
    CatalogSafetensorsShapeOverflow = "catalog.safetensors.shape_overflow", Data, false;
    CatalogSafetensorsSizeMismatch = "catalog.safetensors.size_mismatch", Data, false;
    CatalogSafetensorsTrailingBytes = "catalog.safetensors.trailing_bytes", Data, false;
    CatalogSafetensorsUnknownDtype = "catalog.safetensors.unknown_dtype", Data, false;
    CatalogSafetensorsUnknownField = "catalog.safetensors.unknown_field", Data, false;
    CatalogChecksumMismatch = "catalog.checksum_mismatch", Data, false;
    CliUsage = "cli.usage", Usage, false;
    ClientConnect = "client.connect", Unavailable, true;
    ClientDisconnected = "client.disconnected", Unavailable, true;
    ClientForked = "client.forked", Unavailable, false;
    ClientInterrupted = "client.interrupted", Cancelled, true;
    ClientProtocol = "client.protocol", Internal, false;
    ClientDevice = "client.device", Unavailable, false;
    ClientMap = "client.map", Internal, false;
    ConfigUnreadable = "config.unreadable", Usage, false;
    ConfigInvalid = "config.invalid", Usage, false;
    DaemonDraining = "daemon.draining", Unavailable, true;
    DaemonSocketDirectory = "daemon.socket_directory", Unavailable, false;
    DaemonSocketInUse = "daemon.socket_in_use", Unavailable, false;
    DaemonListen = "daemon.listen", Unavailable, false;
    DaemonStart = "daemon.start", Unavailable, false;
    DeviceCopyFailed = "device.copy_failed", Unavailable, true;
    DeviceLost = "device.lost", Unavailable, false;
    DeviceUnavailable = "device.unavailable", Unavailable, false;
    IdentityCannotActAs = "identity.cannot_act_as", Denied, false;
    IdentityUnknown = "identity.unknown", Denied, false;
    DirectoryBadAddress = "directory.bad_address", Usage, false;
    DirectoryBadAnswer = "directory.bad_answer", Unavailable, true;
    DirectoryBadDigest = "directory.bad_digest", Usage, false;
    DirectoryCredentials = "directory.credentials", Usage, false;
    DirectoryDenied = "directory.denied", Denied, false;
    DirectoryLeaseLost = "directory.lease_lost", Unavailable, true;
    DirectoryTimeout = "directory.timeout", Unavailable, true;
    DirectoryTooMany = "directory.too_many", Limit, true;
    DirectoryUnreachable = "directory.unreachable", Unavailable, true;
    Internal = "internal", Internal, false;
    JobNotFound = "job.not_found", NotFound, false;
    JobCancelled = "job.cancelled", Cancelled, true;
    JobDeadlineExceeded = "job.deadline_exceeded", Cancelled, true;
    JobTooMany = "job.too_many", Limit, true;
    LeaseNotFound = "lease.not_found", NotFound, false;
    LeaseTooMany = "lease.too_many", Limit, false;
    PeerBadRequest = "peer.bad_request", Internal, false;
    PeerBusy = "peer.busy", Limit, true;
    PeerChunkMismatch = "peer.chunk.mismatch", Data, false;
    PeerConnect = "peer.connect", Unavailable, true;
    PeerDisconnected = "peer.disconnected", Unavailable, true;
    PeerGone = "peer.gone", Unavailable, true;
    PeerIdentityRefused = "peer.identity.refused", Denied, false;
    PeerListen = "peer.listen", Unavailable, false;
    PeerManifestMismatch = "peer.manifest.mismatch", Data, false;
    PeerNotFound = "peer.not_found", NotFound, false;
    PeerNotYet = "peer.not_yet", Unavailable, true;
    PeerProtocol = "peer.protocol", Data, false;
    PeerTimeout = "peer.timeout", Unavailable, true;
    PeerTlsCredentials = "peer.tls.credentials", Usage, false;
    PeerTlsHandshake = "peer.tls.handshake", Denied, false;
    PeerTooMany = "peer.too_many", Limit, true;
    PeerVersion = "peer.version", Unavailable, false;
    SelectBadGlob = "select.bad_glob", Usage, false;
    SelectBadSlice = "select.bad_slice", Usage, false;
    PlanTooManyReads = "plan.too_many_reads", Limit, false;
    SelectNoMatch = "select.no_match", NotFound, false;
    SelectTooMany = "select.too_many", Limit, false;
    ApiForbidden = "api.forbidden", Denied, false;
    PeerNobody = "peer.nobody", NotFound, true;
    SourceUriInvalid = "source.uri_invalid", Usage, false;
    SourceSchemeUnsupported = "source.scheme_unsupported", Usage, false;
    SourceFdsInvalid = "source.fds_invalid", Usage, false;
    SourceFileNotFound = "source.file.not_found", NotFound, false;
    SourceFilePermissionDenied = "source.file.permission_denied", Denied, false;
    SourceFileOutsideRoot = "source.file.outside_root", Denied, false;
    SourceFileNotRegular = "source.file.not_regular", Data, false;
    SourceFileChanged = "source.file.changed", Data, true;
    SourceFileShortRead = "source.file.short_read", Data, true;
    SourceFileIo = "source.file.io", Unavailable, true;
    TierGpuOverBudget = "tier.gpu.over_budget", Limit, true;
    TierGpuOutOfMemory = "tier.gpu.out_of_memory", Limit, true;
    TierHostOverBudget = "tier.host.over_budget", Limit, true;
    TierHostOutOfMemory = "tier.host.out_of_memory", Limit, true;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What leaves the library: a stable code, one sentence for a person, and the chain of causes for the log.
#[derive(Debug, Clone)]
pub struct Error {
    /// The stable code.
    pub code: Code,
    /// What happened and what to do, in one or two sentences; shown to the client.
    pub message: String,
    /// What is still in place after the error ("nothing was changed" if empty).
    pub kept: String,
}

impl Error {
    /// An error with this code and message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Error { code, message: message.into(), kept: String::new() }
    }

    /// The same error, saying what is still in place.
    #[must_use]
    pub fn kept(mut self, kept: impl Into<String>) -> Self {
        self.kept = kept.into();
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} [{}]", self.message, self.code)
    }
}

impl std::error::Error for Error {}

/// Result with the library's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;
