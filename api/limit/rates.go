package limit

import (
	"sync"
	"time"

	"golang.org/x/time/rate"
)

type bucket = rate.Limiter

const day = 24 * time.Hour

// Rates limits how much of something a caller may do per second, or per day. A caller may save up
// what it did not use in the last ten seconds, or in the last day.
//
// A caller with a full bucket is like a new one. Such buckets are deleted whenever there are twice
// as many buckets as were not full the last time.
type Rates struct {
	limits     *Limits
	what, flag string
	most       int           // per period; 0: no limit
	per        time.Duration // the period: a second, or a day
	holds      int           // how many periods' worth a bucket holds

	mu    sync.Mutex
	of    map[Caller]*bucket
	sweep int // how many buckets there may be until the next sweep
}

// manyBuckets limits the number of buckets, of some 200 bytes each. Further callers share one: that many within
// ten seconds are not people.
var manyBuckets = 1 << 18

const (
	// saved is how many seconds of a rate a bucket holds.
	saved = 10
	// fewBuckets are kept without a sweep.
	fewBuckets = 1 << 10
)

// Take uses up n. If they are not available, it uses up none and returns an error that says when
// they will be. More than a bucket holds counts as a full bucket.
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

// Owe uses up n even if they are not available yet, and returns how long it takes until they are.
func (r *Rates) Owe(c Caller, n int) time.Duration {
	b := r.bucket(c)
	if b == nil {
		return 0
	}
	now := r.limits.cfg.Now()
	return b.ReserveN(now, min(n, b.Burst())).DelayFrom(now)
}

// after uses up n if they are available, or returns how long it takes until they are. It counts no refusal.
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

// penalize uses up n even if they are not available yet, unless the wait would exceed most.
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

// Over returns an error if nothing is left. It uses up nothing.
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

// bucket returns a caller's bucket, or nil if no limit applies to it.
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

// forget drops full buckets. mu is held.
func (r *Rates) forget() {
	now := r.limits.cfg.Now()
	kept := map[Caller]*bucket{} // a new map: a map keeps its largest size
	for c, b := range r.of {
		if b.TokensAt(now) < float64(b.Burst()) {
			kept[c] = b
		}
	}
	r.of, r.sweep = kept, 2*len(kept)
}
