//! An image behind a front end: reads come from the store, writes go to a scratch overlay or are refused.

use crate::overlay::Overlay;
use std::collections::VecDeque;
use std::sync::Arc;
use varve_front::{Answer, Device, Errno, Request, RequestKind};
use varve_store::Image;

/// The device. It answers at once, on the front end's thread.
pub struct ImageDevice {
    image: Arc<Image>,
    overlay: Option<Overlay>,
    answers: VecDeque<Answer>,
}

/// Reads an image; what is wrong is said, and is an I/O error.
pub(crate) fn read_or_say(image: &Image, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
    image.read(offset, bytes).map_err(|error| {
        eprintln!("varved: image at {}: {error}", image.lsn());
        libc::EIO
    })
}

impl ImageDevice {
    /// A device that shows `image`, writable if there is an overlay.
    #[must_use]
    pub fn new(image: Arc<Image>, overlay: Option<Overlay>) -> ImageDevice {
        ImageDevice {
            image,
            overlay,
            answers: VecDeque::new(),
        }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> Result<(), Errno> {
        let below = |at: u64, part: &mut [u8]| read_or_say(&self.image, at, part);
        match &self.overlay {
            Some(overlay) => overlay.read(offset, bytes, below),
            None => below(offset, bytes),
        }
    }

    fn serve(&mut self, request: &Request) -> Result<(), Errno> {
        // A part of a sector would be answered with what lies at its beginning.
        let sector = u64::from(self.image.sector_bytes());
        let end = request.offset.checked_add(request.length);
        if end.is_none_or(|end| end > self.image.bytes())
            || !(request.offset | request.length).is_multiple_of(sector)
        {
            return Err(libc::EINVAL);
        }
        match (request.kind, &request.buffer) {
            (RequestKind::Flush, _) => Ok(()),
            (RequestKind::Read, Some(buffer)) => {
                buffer.write_with(|bytes| self.read(request.offset, bytes))
            }
            (kind, buffer) => {
                let Some(overlay) = self.overlay.as_mut() else {
                    return Err(libc::EROFS);
                };
                let errno = |error: std::io::Error| error.raw_os_error().unwrap_or(libc::EIO);
                match (kind, buffer) {
                    (RequestKind::Write, Some(buffer)) => buffer
                        .read_with(|bytes| overlay.write(request.offset, bytes))
                        .map_err(errno),
                    _ => overlay.zero(request.offset, request.length).map_err(errno),
                }
            }
        }
    }
}

impl Device for ImageDevice {
    fn submit(&mut self, request: Request) {
        let result = self.serve(&request);
        self.answers.push_back(Answer {
            tag: request.tag,
            result,
        });
    }
    fn completion(&mut self, _user_data: u64, _result: i32) {}
    fn woken(&mut self) {}
    fn run(&mut self) {}
    fn take_answer(&mut self) -> Option<Answer> {
        self.answers.pop_front()
    }
    fn end_turn(&mut self) -> (u64, u64) {
        (varve_front::monotonic_ns(), 1_000_000_000)
    }
    fn is_quiet(&self) -> bool {
        self.answers.is_empty()
    }
    fn closed(&mut self) {}
}
