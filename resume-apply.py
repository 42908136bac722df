def sub(p, pairs):
    s=open(p).read()
    for a,b in pairs:
        assert a in s, (p,a)
        s=s.replace(a,b,1)
    open(p,'w').write(s)
import shutil,os
os.makedirs('src/train/run',exist_ok=True)
sub('src/train/run.rs',[
("use std::{\n    collections::VecDeque,","mod resume;\n\nuse std::{\n    collections::VecDeque,"),
("            dropout: batches::rng(r.seed, Stream::Dropout),","            dropout: batches::rng_at(r.seed, Stream::Dropout, 0),"),
("        let batch = self.batches.next_batch();\n","        let batch = self.batches.next_batch();\n        // by step, so that a run that goes on from a checkpoint draws what it would have drawn\n        self.dropout = batches::rng_at(r.seed, Stream::Dropout, self.step);\n"),
])
sub('src/train/batches.rs',[
("/// Batches per length pool:","""/// The generator of one purpose in one step of a job.
pub fn rng_at(seed: u64, stream: Stream, step: u32) -> StdRng {
    rng(seed ^ u64::from(step).wrapping_mul(0xd1b5_4a32_d192_ed03), stream)
}

/// Batches per length pool:"""),
])
sub('src/train/optim.rs',[
("    /// One update. `grads`","""    /// First and second moments, in order.
    pub fn moments(&self) -> impl Iterator<Item = (&Tensor, &Tensor)> {
        self.slots.iter().map(|s| (&s.m, &s.v))
    }

    /// Goes on after so many updates with these moments, in order.
    ///
    /// # Errors
    /// Moments of other shapes, or another number of them.
    pub fn restore(&mut self, step: u32, moments: impl ExactSizeIterator<Item = (Tensor, Tensor)>) -> Result<()> {
        if moments.len() != self.slots.len() {
            candle_core::bail!("{} moments for {} variables", moments.len(), self.slots.len());
        }
        for (slot, (m, v)) in self.slots.iter_mut().zip(moments) {
            if m.shape() != slot.var.shape() || v.shape() != slot.var.shape() {
                candle_core::bail!("moments {:?} for a variable {:?}", m.shape(), slot.var.shape());
            }
            (slot.m, slot.v) = (m, v);
        }
        self.step = step as i32;
        Ok(())
    }

    /// One update. `grads`"""),
])
sub('src/train/trainable.rs',[
("pub struct Snapshot(Vec<Tensor>);\n","""pub struct Snapshot(Vec<Tensor>);

impl Snapshot {
    /// Of values in the order of the variables.
    pub(super) fn of(values: Vec<Tensor>) -> Self {
        Self(values)
    }

    /// Values in the order of the variables.
    pub(super) fn tensors(&self) -> &[Tensor] {
        &self.0
    }
}
"""),
])
