// Package web holds the page and the JavaScript client, as they are served. gapless.js is the
// client, for anybody's pages; gapless.d.ts is made from it (types_test.go).
//
// There is no build step: what is in this folder is what a browser gets. The page works
// under a Content-Security-Policy that allows nothing but files and connections of its
// own origin, so there is no inline script and no inline style in it.
package web

import "embed"

// Files holds the page: index.html, for "/", and the files that it names, which lie
// beside it ("/app.js", "/style.css", ...). In docs is the API reference, for "/docs": it is Swagger
// UI as it is published (npm swagger-ui-dist), its large files compressed, and what starts it.
// In vendor is what the page has of others, as they published it (npm marked, dompurify).
//
//go:embed index.html app.js bounded.js gapless.js gapless.d.ts markdown.js naive.js plot.js style.css favicon.svg vendor/*.js docs
var Files embed.FS
