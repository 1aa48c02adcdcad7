package main

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"
)

const largeCount = 24

// large appends that many chunks of 60 KB, and what ends them: more than all the buffers on the way to
// a viewer hold.
func large(t *testing.T, n *node, session string, end string) {
	t.Helper()
	for i := range largeCount / 3 {
		chunk := func(k int) string { return fmt.Sprintf(`{"content":"%d %s"}`, 3*i+k, strings.Repeat("x", 60_000)) }
		n.append(t, session, "["+chunk(1)+","+chunk(2)+","+chunk(3)+"]")
	}
	if end != "" {
		n.append(t, session, end)
	}
}

func TestSlow_aViewerThatTakesNothingIsCutAndComesBackForTheRest(t *testing.T) {
	t.Parallel()
	n := start(t, "-write-timeout", "500ms")
	ctx := deadline(t)
	session := newID()
	large(t, n, session, `{"type":"end"}`)
	v := &viewer{session: session, dialer: net.Dialer{Control: smallReceiveBuffer}}
	waited := false
	v.nextConnection(false)
	how := v.raw(ctx, n.addr, func(b []byte) bool {
		if !waited {
			waited = true
			other := &viewer{session: session} // whom that costs nothing
			other.follow(ctx, at(n.addr), nil)
			other.check(t, n.pages(t, session))
			eventually(t, "the viewer is cut", func() bool { return strings.Contains(n.log.String(), "cause=slow") })
		}
		return v.feed(b, func(e event) bool { v.take(e); return true })
	})
	if how != aborted || v.cursor > largeCount {
		t.Errorf("the viewer ended %s, at %d", how, v.cursor)
	}
	v.dialer = net.Dialer{}
	v.follow(ctx, at(n.addr), nil)
	v.check(t, n.pages(t, session))
	v.unreset(t)
}

func TestSlow_aViewerThatIsSlowAndTakesSomethingIsNotCut(t *testing.T) {
	t.Parallel()
	n := start(t, "-write-timeout", "500ms")
	ctx := deadline(t)
	session := newID()
	large(t, n, session, `{"type":"end"}`)
	v := &viewer{session: session, dialer: net.Dialer{Control: smallReceiveBuffer}}
	v.nextConnection(false)
	begun := time.Now()
	how := v.raw(ctx, n.addr, func(b []byte) bool {
		time.Sleep(10 * time.Millisecond) // a slow reader, in portions of at most 8 KB
		return v.feed(b, func(e event) bool { v.take(e); return true })
	})
	if how != clean {
		t.Errorf("the viewer ended %s, at %d", how, v.cursor)
	}
	if took := time.Since(begun); took < time.Second {
		t.Errorf("it took only %v: the viewer was not slow", took)
	}
	v.check(t, n.pages(t, session))
}

// smallReceiveBuffer has the kernel hold little for a viewer that does not read.
func smallReceiveBuffer(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10) })
}
