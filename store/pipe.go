package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// pipe sends the commands of many callers together (group commit): while some are on their
// way, those that come meanwhile wait, and then share one write and one read. One that
// comes alone goes at once.
//
// In a Cluster each goes by itself: there go-redis sends a pipeline's commands again when a connection
// breaks, whatever they are. (Its own automatic pipelines do not say which commands were never sent.)
type pipe struct {
	rdb     redis.UniversalClient
	most    int           // batches under way at a time
	timeout time.Duration // of the client: half of it is how long a command waits for its turn

	mu      sync.Mutex
	waiting []*sending
	under   int // batches that are under way
}

// sending is a command of a caller who waits.
type sending struct {
	cmd  *once
	size int           // bytes, about
	done chan struct{} // closed when cmd has its reply, or its error
}

// A batch has one write and one time-out: so many commands, and so many bytes.
const (
	batchMost  = 128
	batchBytes = 1 << 20
)

// do executes a command, once. It waits for its turn for half of the time-out at most, and no
// longer than ctx: behind that it is not sent (errUnsent). One that is on its way is waited
// for: the client's own time-outs bound that.
func (p *pipe) do(ctx context.Context, cmd *once) error {
	p.mu.Lock()
	if p.under < p.most {
		p.under++
		p.mu.Unlock()
		defer p.next()
		return p.rdb.Process(ctx, cmd)
	}
	s := &sending{cmd: cmd, done: make(chan struct{})}
	for _, arg := range cmd.Args() {
		if text, ok := arg.(string); ok {
			s.size += len(text)
		}
	}
	p.waiting = append(p.waiting, s)
	p.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, p.timeout/2)
	defer cancel()
	select {
	case <-s.done:
		return cmd.Err()
	case <-ctx.Done():
	}
	p.mu.Lock()
	i := slices.Index(p.waiting, s)
	if i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
	}
	p.mu.Unlock()
	if i >= 0 {
		return fmt.Errorf("%w: %w", errUnsent, ctx.Err())
	}
	<-s.done
	return cmd.Err()
}

var errUnsent = errors.New("the command was not sent")

// next ends a batch's way, and begins that of those who wait.
func (p *pipe) next() {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, bytes := 0, 0
	for n < len(p.waiting) && n < batchMost && (n == 0 || bytes+p.waiting[n].size <= batchBytes) {
		bytes += p.waiting[n].size
		n++
	}
	if n == 0 {
		p.under--
		return
	}
	batch := slices.Clone(p.waiting[:n])
	p.waiting = slices.Delete(p.waiting, 0, n)
	go p.send(batch) // ends within the client's time-outs
}

func (p *pipe) send(batch []*sending) {
	defer p.next()
	together := p.rdb.Pipeline()
	for _, s := range batch {
		_ = together.Process(context.Background(), s.cmd)
	}
	_, err := together.Exec(context.Background())
	for _, s := range batch {
		if err != nil && !s.cmd.answered && s.cmd.Err() == nil {
			s.cmd.SetErr(err)
		}
		close(s.done)
	}
}
