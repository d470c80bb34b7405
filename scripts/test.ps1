# Run all checks that a change must pass. This script does the same as test.sh. All arguments go to pytest:
#   ./scripts/test.ps1 -m slow
Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'
. (Join-Path $PSScriptRoot 'venv.ps1')

Push-Location (Join-Path $PSScriptRoot '..')
try {
    $python = Initialize-Venv -Extras dev
    $watch = [Diagnostics.Stopwatch]::StartNew()
    Invoke-Checked $python -m ruff check .
    Invoke-Checked $python -m ruff format --check .
    Invoke-Checked $python -m mypy
    $options = if ($args) { $args } else { '-n', 'auto', '--dist', 'loadfile' }
    Invoke-Checked $python -m pytest @options
    [Console]::Error.WriteLine("scripts/test.ps1: passed, $([int]$watch.Elapsed.TotalSeconds) s after installation")
}
finally {
    Pop-Location
}
