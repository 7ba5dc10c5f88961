//! [`Courier`] of a device: copies from page-locked memory on a stream of their own.

use std::sync::{Arc, Mutex, PoisonError};

use draftsmith_kernels::{Coming, Courier};

use crate::error::CudaError;
use crate::launcher::Launcher;
use crate::memory::Buf;
use crate::ops::Cuda;

/// Sendings whose host memory is kept: one is read by the device, the other is filled.
const SENDINGS: usize = 2;
/// Host memory is asked for in whole pieces of this.
const PIECE: usize = 1 << 20;

/// Host memory, and the copy that reads it.
struct Sending<L: Launcher> {
    staging: L::Staging,
    copied: Option<Arc<L::Mark>>,
}

/// Who sends data to a device.
pub(crate) struct Sender<L: Launcher> {
    cuda: Cuda<L>,
    /// The one that was used last is the last.
    sendings: Mutex<Vec<Sending<L>>>,
}

impl<L: Launcher> Sender<L> {
    pub(crate) fn new(cuda: Cuda<L>) -> Sender<L> {
        Sender { cuda, sendings: Mutex::default() }
    }

    /// Host memory of at least so many bytes that no copy reads.
    fn free(&self, sendings: &mut Vec<Sending<L>>, bytes: usize) -> Result<Sending<L>, CudaError> {
        let launcher = self.cuda.launcher();
        if sendings.len() >= SENDINGS {
            let mut oldest = sendings.remove(0);
            if let Some(copied) = oldest.copied.take() {
                launcher.wait_for(&copied)?;
            }
            if oldest.staging.len() >= bytes {
                return Ok(oldest);
            }
        }
        Ok(Sending { staging: launcher.staging(bytes.next_multiple_of(PIECE))?, copied: None })
    }

    fn try_send(&self, parts: &[&[f32]]) -> Result<Coming<Buf<L>>, CudaError> {
        let mut sendings = self.sendings.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = parts.iter().map(|part| size_of_val(*part)).sum();
        let mut sending = self.free(&mut sendings, bytes)?;
        let (mut bufs, mut places, mut from) = (Vec::new(), Vec::new(), 0);
        for part in parts {
            let bytes: &[u8] = bytemuck::cast_slice(part);
            sending.staging[from..from + bytes.len()].copy_from_slice(bytes);
            let block = if part.is_empty() { None } else { Some(self.cuda.pool.take(bytes.len())?) };
            bufs.push(Buf { capacity: part.len(), block, ..Buf::default() });
            places.push(from..from + bytes.len());
            from += bytes.len();
        }
        let copies = bufs.iter().zip(places).filter_map(|(buf, place)| Some((buf.place(0)?, place)));
        let mark = Arc::new(self.cuda.pool.stream.send(&copies.collect::<Vec<_>>(), &sending.staging)?);
        sending.copied = Some(Arc::clone(&mark));
        sendings.push(sending);
        let cuda = self.cuda.clone();
        Ok(Coming::new(bufs, move || cuda.pool.stream.after(&mark).map_err(|error| cuda.failure(error))))
    }
}

impl<L: Launcher> Courier<Buf<L>> for Sender<L> {
    fn send(&self, parts: &[&[f32]]) -> Option<Coming<Buf<L>>> {
        match self.try_send(parts) {
            Err(CudaError::Memory { .. }) => None,
            sent => Some(self.cuda.must(sent)),
        }
    }
}

impl<L: Launcher> Drop for Sender<L> {
    fn drop(&mut self) {
        // The device may still read what was sent last.
        let sendings = self.sendings.get_mut().unwrap_or_else(PoisonError::into_inner);
        for copied in sendings.iter().filter_map(|sending| sending.copied.as_ref()) {
            let _ = self.cuda.launcher().wait_for(copied);
        }
    }
}
