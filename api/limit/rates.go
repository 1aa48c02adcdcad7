package limit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

type bucket = rate.Limiter

const day = 24 * time.Hour

// Rates is how much of something a caller may do in a second, or in a day. What it did not do in the last ten seconds, or in the last
// day, it may do at once.
//
// A caller whose bucket is full is like one that was never seen: such are forgotten whenever there
// are twice as many buckets as were not full the last time.
type Rates struct {
	limits     *Limits
	what, flag string
	most       int           // in each per; 0: no bound
	per        time.Duration // a second, or a day
	holds      int           // for how many of them a bucket has room

	mu    sync.Mutex
	of    map[Caller]*bucket
	sweep int // how many buckets there may be until the next look at them
}

// manyBuckets bounds them, with some 200 bytes each. Callers beyond share one: so many at once,
// within ten seconds, are no people.
var manyBuckets = 1 << 18

const (
	// saved is how many seconds of a rate a bucket holds.
	saved = 10
	// fewBuckets are kept without a look.
	fewBuckets = 1 << 10
)

// Take uses n up, or, with an error that says when they will be there, none. More than a bucket
// holds counts as a bucket.
func (r *Rates) Take(c Caller, n int) error {
	b := r.bucket(c)
	if b == nil {
		return nil
	}
	now := r.limits.cfg.Now()
	taken := b.ReserveN(now, min(n, b.Burst()))
	after := taken.DelayFrom(now)
	if after == 0 {
		return nil
	}
	taken.CancelAt(now)
	return r.limits.Refuse(r.error(after))
}

// Owe uses n up although they may not be there yet, and says how long it takes until they are.
func (r *Rates) Owe(c Caller, n int) time.Duration {
	b := r.bucket(c)
	if b == nil {
		return 0
	}
	now := r.limits.cfg.Now()
	return b.ReserveN(now, min(n, b.Burst())).DelayFrom(now)
}

// after uses n up, or says how long it takes until they are there. It is no refusal.
func (r *Rates) after(c Caller, n int) time.Duration {
	b := r.bucket(c)
	if b == nil {
		return 0
	}
	now := r.limits.cfg.Now()
	taken := b.ReserveN(now, min(n, b.Burst()))
	after := taken.DelayFrom(now)
	if after > 0 {
		taken.CancelAt(now)
	}
	return after
}

// penalize uses n up also if they are not there yet, unless more than most is to be waited for already.
func (r *Rates) penalize(c Caller, n int, most time.Duration) {
	b := r.bucket(c)
	if b == nil {
		return
	}
	now := r.limits.cfg.Now()
	if taken := b.ReserveN(now, min(n, b.Burst())); taken.DelayFrom(now) > most {
		taken.CancelAt(now)
	}
}

// Over says, without using anything up, whether there is nothing left.
func (r *Rates) Over(c Caller) *Error {
	b := r.bucket(c)
	if b == nil {
		return nil
	}
	left := b.TokensAt(r.limits.cfg.Now())
	if left >= 1 {
		return nil
	}
	return r.error(time.Duration((1 - left) / float64(r.most) * float64(r.per)))
}

func (r *Rates) error(after time.Duration) *Error {
	return &Error{Limit: r.flag, Most: r.most, What: r.what, Rate: true, Day: r.per == day, Caller: true, After: after}
}

// bucket is a caller's; nil: there is no bound for it.
func (r *Rates) bucket(c Caller) *bucket {
	if r.most == 0 || c == (Caller{}) {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if b := r.of[c]; b != nil {
		return b
	}
	if len(r.of) >= max(r.sweep, fewBuckets) {
		r.forget()
	}
	if len(r.of) >= manyBuckets {
		c = Caller{}
		if b := r.of[c]; b != nil {
			return b
		}
	}
	b := rate.NewLimiter(rate.Limit(float64(r.most)/r.per.Seconds()), r.holds*r.most)
	r.of[c] = b
	return b
}

// forget keeps only buckets that are not full. mu is held.
func (r *Rates) forget() {
	now := r.limits.cfg.Now()
	kept := map[Caller]*bucket{} // another one: a map keeps the room that it had at its largest
	for c, b := range r.of {
		if b.TokensAt(now) < float64(b.Burst()) {
			kept[c] = b
		}
	}
	r.of, r.sweep = kept, 2*len(kept)
}
