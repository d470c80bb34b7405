# The whole road from text to a GGUF file; the twin of run_pipeline.sh, with the same flags:
#   ./scripts/run_pipeline.ps1 --demo
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'
. (Join-Path $PSScriptRoot 'venv.ps1')

$root = Split-Path -Parent $PSScriptRoot
Push-Location $root
try {
    $python = Join-Path $root (Initialize-Venv -Extra llama)
}
finally {
    Pop-Location # paths that are given are the caller's
}
& $python -m atlas pipeline @args
exit $LASTEXITCODE
